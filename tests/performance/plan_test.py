"""Plans: facts from the text of compiled programs, and the binary with the real TPU compiler."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from configs import fiq, fiq_clip, shapes
from dqe_jax.config import RunConfig
from dqe_jax.performance.planning import (
    chips,
    compiler,
    hlo,
    programs,
    run,
    store_lines,
    stores,
    table,
    traced,
)
from dqe_jax.testing.commands import run_module
from dqe_jax.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, the TPU compiler (Linux x86-64)",
)

# ------------------------------------------------------------------------ text of a program (HLO)

MODULE = """\
HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  ROOT %sum = f32[]{:T(128)} add(%a, %a), backend_config={"estimated_cycles":"1000000"}
}

%inside (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %neg = bf16[8,128]{1,0} negate(%p), backend_config={"estimated_cycles":"1000000"}
}

%body (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %f = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%s), kind=kLoop, calls=%inside, backend_config={"window_config":{"estimated_cycles":"100"}}
  %ar = bf16[8,128]{1,0} all-reduce(%f), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add.1
  ROOT %t = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%s, %ar)
}

%condition (s.1: (s32[], bf16[8,128])) -> pred[] {
  %s.1 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%endless (s.2: (s32[], bf16[8,128])) -> pred[] {
  %s.2 = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %go = pred[]{:T(512)} custom-call(%s.2), custom_call_target="Go"
}

%begin (x: f32[4,256]) -> (f32[4,256], f32[32,256], u32[]) {
  %x = f32[4,256]{1,0} parameter(0)
  %ag.1 = f32[32,256]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c.1 = (f32[4,256]{1,0}, f32[32,256]{1,0}, u32[]{:S(2)}) custom-call(%ag.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (y: f32[4,256]) -> f32[32,256] {
  %y = f32[4,256]{1,0} parameter(0)
  %ag.2 = f32[32,256]{1,0} all-gather(%y), replica_groups=[1,8]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c.2 = f32[32,256]{1,0} custom-call(%ag.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (q: bf16[8,128], r: f32[4,256]) -> (s32[], bf16[8,128]) {
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %r = f32[4,256]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %init = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%zero, %q)
  %loop = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%init), condition=%condition, body=%body
  %again = (s32[]{:T(128)}, bf16[8,128]{1,0}) while(%loop), condition=%endless, body=%body
  %start = (f32[4,256]{1,0}, f32[32,256]{1,0}, u32[]{:S(2)}) fusion(%r), kind=kCustom, calls=%begin
  %done = f32[32,256]{1,0} fusion(%start), kind=kCustom, calls=%go_on
  %rs = f32[4,256]{1,0} reduce-scatter(%done), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add.1
  %ags = (f32[4,256]{1,0}, f32[32,256]{1,0}) all-gather-start(%rs), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %agd = f32[32,256]{1,0} all-gather-done(%ags), backend_config={"estimated_cycles":"50"}
  ROOT %out = (s32[]{:T(128)}, bf16[8,128]{1,0}) tuple(%loop, %again)
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("f32[]{:T(128)}", 4),
        ("pred[16]{0}", 16),
        ("s4[16]{0}", 8),
        ("f8e4m3fn[16]{0}", 16),
        ("(f32[2,3]{1,0}, /*index=1*/s32[]{:T(128)}, (u8[5]{0}, token[]))", 24 + 4 + 5),
        ("f32[0,4]{1,0}", 0),
    ],
)
def test_bytes_of_a_shape(shape, size):
    assert hlo.shape_bytes(shape) == size


def test_elements_of_a_tuple():
    assert hlo.elements("(f32[2,3]{1,0:T(8,128)}, (u8[5]{0}, s32[]))") == [
        "f32[2,3]{1,0:T(8,128)}",
        "(u8[5]{0}, s32[])",
    ]
    assert hlo.elements("f32[2,3]{1,0}") == ["f32[2,3]{1,0}"]


def test_loops_count_as_often_as_they_run():
    module = hlo.Module(MODULE)
    assert module.entry == "main"
    assert module.endless == 1  # the second loop: once
    # Neither what is inside a fusion nor the sum of a collective counts.
    assert module.cycles() == 13 * 100 + 50


def test_collectives_count_once_and_loops_multiply_them():
    found = hlo.Module(MODULE).traffic()
    assert set(found) == {"all-gather", "all-reduce", "reduce-scatter"}
    assert found["all-reduce"] == hlo.Traffic(13, 13 * 2048, 13 * 2048 * 2 * 3 / 4)
    # One is woven into two fusions, the other has a start and a done.
    assert found["all-gather"] == hlo.Traffic(2, 2 * 32768, 2 * 32768 * 7 / 8)
    assert found["reduce-scatter"] == hlo.Traffic(1, 4096, 4096 * 7)


def test_a_fused_reduce_scatter_is_no_all_reduce():
    text = MODULE.replace("calls=%begin", "calls=%all-reduce-scatter.2").replace(
        "%begin (", "%all-reduce-scatter.2 ("
    )
    text = text.replace(
        "%ag.1 = f32[32,256]{1,0} all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}, "
        'frontend_attributes={chain_id="0"}',
        "%ag.1 = f32[32,256]{1,0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add.1",
    )
    found = hlo.Module(text).traffic()
    assert found["reduce-scatter"] == hlo.Traffic(2, 2 * 4096, 2 * 4096 * 7)
    assert found["all-reduce"] == hlo.Module(MODULE).traffic()["all-reduce"]


def test_the_limit_of_a_loop_is_found_in_what_it_carries():
    text = MODULE.replace(
        "  %limit = s32[]{:T(128)} constant(12)",
        "  %limit = s32[]{:T(128)} get-tuple-element(%s.1), index=2",
    ).replace("tuple(%zero, %q)", "tuple(%zero, %q, %five)")
    text = text.replace("  %zero =", "  %five = s32[]{:T(128)} constant(5)\n  %zero =")
    assert hlo.Module(text).cycles() == 6 * 100 + 50


# ------------------------------------------------------------------------------- traced programs


def test_flop_of_loops_and_large_arrays():
    def step(x, weights):
        def layer(carry, w):
            return jnp.tanh(carry @ w), None

        x = jax.lax.scan(layer, x, weights)[0]
        return jax.lax.cond(x.sum() > 0, lambda y: y @ y.T, lambda y: y.sum() * (y @ y.T), x)

    shapes = jnp.zeros((4, 16)), jnp.zeros((3, 16, 16))
    jaxpr = jax.make_jaxpr(step)(*shapes).jaxpr
    assert traced.matrix_flops(jaxpr) == 3 * 2 * 4 * 16 * 16 + 2 * 4 * 4 * 16
    largest = traced.largest_arrays(jaxpr, 1)[0]
    assert (largest.shape, largest.bytes) == ("float32[4,16]", 256)
    assert largest.count >= 6


# ------------------------------------------------------------------------------ slices and advice


def test_slices_by_name():
    assert chips.parse_topology("v5e:16x16").devices == 256
    assert chips.parse_topology("v4:2x2x2").devices == 8
    assert chips.parse_topology("v3:2x2").devices == 8  # two cores a chip
    assert chips.parse_topology("gpu").chip is None
    assert chips.parse_topology("h100:8").devices == 8


@pytest.mark.parametrize("name", ["v5x:2x4", "v5e", "v5e:0", "", "tpu"])
def test_an_unknown_slice_names_those_that_exist(name):
    with pytest.raises(UserError, match=r"--topology=.*v4:2x2x2.*v5e:2x4.*v6e:2x4.*gpu:8"):
        chips.parse_topology(name)


def test_the_compilers_errors_are_read():
    one = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (49.19G) exceeds available HBM (15.75G)."
    )
    assert compiler.read_out_of_memory(one) == (round(49.19 * 2**30), 0, round(15.75 * 2**30))
    other = "Ran out of memory in memory space hbm. Used 20.5G of 512.00M hbm. Exceeded by"
    assert compiler.read_out_of_memory(other) == (0, round(20.5 * 2**30), 2**29)
    assert compiler.read_out_of_memory("something else") == (0, 0, 0)


def facts(name="step", **fields):
    given = {"inputs": {"parameters": 1, "optimiser": 2, "batch": 1}, "fits": False, **fields}
    return compiler.Facts(name=name, queries=8, **given)


def test_tables_are_narrow_and_say_what_is_what():
    gib, names = 2**30, ("step", "bank step", "bank refresh", "gallery embedding")
    kinds = ("all-gather", "all-reduce", "collective-permute")
    traffic = {kind: hlo.Traffic(1234, 123 * gib, 123 * gib) for kind in kinds}
    inputs = dict.fromkeys(table.INPUTS, 123 * gib)
    large = {"inputs": inputs, "arguments": 600 * gib, "temporaries": 123 * gib, "code": gib}
    large |= {"resident": 123 * gib, "needed": 900 * gib, "memory": 16 * gib, "flops": 1e15}
    large |= {"compute_seconds": 123.4, "link_seconds": 12.3, "collectives": traffic}
    programs = tuple(facts(name, **large, fits=name != "step") for name in names)
    plans = [table.Plan(chips.parse_topology(f"v5e:{s}"), 4096, programs) for s in ("2x4", "16x16")]
    said = table.tables(plans)
    assert max(map(len, said.splitlines())) <= 100
    assert "v5e:16x16: 256 chips, 4096 references" in said
    memory = said.splitlines()[2:4]
    assert memory[0].split()[:5] == ["GiB", "per", "device", "params", "optimiser"]
    assert memory[1].startswith("step")
    assert memory[1].endswith("too much")
    assert "sent per device" in said
    assert said.split("scaling")[2].split("\n")[1].endswith("3%")  # 8 of 256 devices' rate


def test_gpus_and_machines_by_name():
    h100 = chips.parse_topology("h100")
    assert (h100.devices, h100.hosts, h100.host_memory) == (1, 1, None)
    assert h100.memory == round(0.75 * (81_559 << 20))
    assert chips.parse_topology("A100-80GB:16", host_memory=512).hosts == 2
    assert chips.parse_topology("a100").memory == chips.parse_topology("a100-40gb").memory
    other = chips.parse_topology("gpu:4", gpu_memory=24, host_memory=64)
    assert (other.memory, other.host_memory) == (18 * 10**9, 64 * 10**9)
    assert chips.parse_topology("gpu").memory is None
    for name, hosts, memory in [
        ("v5e:2x4", 1, 384),
        ("v5e:16x16", 64, 192),
        ("v4:2x2x1", 1, 407),
        ("v4:2x2x2", 2, 407),
    ]:
        one = chips.parse_topology(name)
        assert (one.hosts, one.host_memory) == (hosts, memory * 10**9)
    assert chips.parse_topology("v2:2x2").host_memory is None
    assert chips.parse_topology("v2:2x2", host_memory=300).host_memory == 300 * 10**9


@pytest.mark.parametrize("memory", [{"gpu_memory": 0}, {"host_memory": -1.0}])
def test_no_memory_is_refused(memory):
    with pytest.raises(UserError, match=r"--\w+_memory=(0|-1): give GB of memory, more than 0\."):
        chips.parse_topology("gpu", **memory)


GB = 10**9


@pytest.mark.parametrize(
    ("device", "host", "places"),
    [
        (10, 0, ["device", "device"]),
        (9, 20, ["host", "device"]),
        (9, 19, ["disk", "device"]),
        (1, 20, ["host", "host"]),
        (1, 3, ["disk", "disk"]),
        (1, 4, ["disk", "host"]),
    ],
)
def test_auto_takes_at_most_half_of_what_is_free(device, host, places):
    # 10 GB of images and 2 GB of texts, on 2 devices of which 1 GB is held.
    machines = stores.Machines(1, round((device + 1) * GB), round(host * GB))
    kinds = [stores.Kind("images", 16, 4, GB // 2, 0), stores.Kind("texts", 4, 0, GB // 2, 0)]
    found = stores.place_all(kinds, "auto", 2, machines, GB)
    assert [one.place for one in found] == places
    assert [one.nbytes for one in found] == [10 * GB, 2 * GB]


def test_unknown_memory_leaves_places_open():
    kind = stores.Kind("images", 10, 0, GB, 2 * 10**6)

    def places(device, host, asked="auto"):
        machines = stores.Machines(1, device, host)
        return stores.place_all([kind], asked, 4, machines, 0)[0].places

    assert places(None, None) == ("device", "host", "disk")
    assert places(None, 20 * GB) == ("device", "host")
    assert places(None, 19 * GB) == ("device", "disk")
    assert places(4 * GB, None) == ("host", "disk")
    assert places(5 * GB, None) == ("device",)
    assert places(None, None, "host") == ("host",)


def test_a_step_reads_from_where_rows_lie():
    kind = stores.Kind("images", 10, 6, GB, 2 * 10**6)

    def said(device, host, asked="auto", devices=8, hosts=2):
        machines = stores.Machines(hosts, device, host)
        (one,) = stores.place_all([kind], asked, devices, machines, 0)
        lines = store_lines.stored_lines(one)
        assert max(map(len, lines.splitlines())) <= 100
        return lines.replace("\n ", "")

    size = "features of images: 16 rows of 1 GB, 16 GB (10 to train on, 6 to evaluate on) "
    assert said(4 * GB, None) == (
        f"{size}they lie on the devices, 2 of 4 GB free on each a step takes 2 MB on each "
        "device, which reads 16 MB of its memory and sends 14 MB"
    )
    assert said(40 * GB, None, devices=1, hosts=1).endswith(
        "16 of 40 GB free on each a step reads 2 MB from the memory of the device"
    )
    assert said(GB, 32 * GB) == (
        f"{size}they lie in each host's memory, 16 of 32 GB free; a device would need 2 of "
        "1 GB free a step reads 8 MB from each host's memory, and each device gets 2 MB"
    )
    assert "they lie on disk a step reads 8 MB from each host's disk" in said(0, 0, "disk")
    assert "on disk; a device would need 2 of 1 GB free, and a host 16 of 31 GB free" in (
        said(GB, 31 * GB)
    )
    assert (
        "on the devices if 4 GB are free on each, else in each host's memory if 32 GB are free, "
        "else on disk a step takes 2 MB on each device"
    ) in said(None, None)
    unknown = dataclasses.replace(kind, training=0, evaluation=0)
    (one,) = stores.place_all([unknown], "auto", 8, stores.Machines(), 0)
    assert "how many is not known" in store_lines.stored_lines(one)


@pytest.mark.parametrize(
    ("memory", "changes", "places"),
    [
        (80 << 30, {}, ["device", "device"]),
        (80 << 30, {"features.place": "disk"}, ["disk", "disk"]),
        (2 << 30, {}, ["auto", "device"]),
        (None, {}, ["auto", "auto"]),
    ],
)
def test_what_frozen_towers_make_is_planned(memory, changes, places):
    # 16 queries over 12 references on each device.
    config = RunConfig.of(fiq_clip.get_config()).with_changes({"batch.references": 16, **changes})
    sizes = {"vocabulary": 100, "names": ("step",), "machines": stores.Machines(1, memory)}
    sizes |= {"counts": stores.Counts(images=1000, texts=300, eval_images=200, eval_texts=50)}
    (step,), (images, texts) = programs.make_programs(config, jax.devices()[:2], **sizes)
    assert images.rows == 2200  # mirrored too, but for those to evaluate on
    assert images.kind.row_bytes == (256 * 1024 + 1024) * 2  # patch tokens and the class token
    assert images.kind.read == (12 + 16) * images.kind.row_bytes
    assert texts.rows == 650  # in two orders of their captions
    assert texts.kind.row_bytes == 77 * 768 * 2
    assert texts.kind.read == 16 * texts.kind.row_bytes
    assert [images.place, texts.place] == places
    on_devices = [one.nbytes for one in (images, texts) if one.place == "device"]
    assert step.resident == sum(on_devices) // 2
    assert step.inputs["batch"] > images.kind.read + texts.kind.read  # in place of images and texts
    off = config.with_changes({"features.place": "off"})
    (plain,), nothing = programs.make_programs(off, jax.devices()[:2], **sizes)
    assert nothing == ()
    assert plain.resident == 0
    pixels = (12 + 16) * 224 * 224 * 3
    assert pixels < plain.inputs["batch"] < 1.1 * pixels


def test_what_gpus_need_is_at_least_what_is_counted():
    config = RunConfig.of(shapes.get_config("smoke"))
    sizes = {"counts": stores.Counts(100), "vocabulary": 100, "names": ("step",)}
    (step,), _ = programs.make_programs(config, jax.devices()[:1], **sizes)
    needed = sum(step.inputs.values())
    fitting, small = (compiler.lower_for_gpu(step, m) for m in (2 * needed, needed // 2))
    assert (fitting.fits, fitting.needed, fitting.memory) == (None, needed, 2 * needed)
    assert small.fits is False
    gpu = chips.parse_topology("gpu")
    assert "over 50%" in table.memory_table(table.Plan(gpu, 8, (fitting,)))
    (sentence,) = table.sentences_of_misfits(config, table.Plan(gpu, 8, (small,)))
    assert sentence.startswith("gpu: the step does not fit: it needs")


# FashionIQ with the features of ViT-g/14: 45,429 images to train on, 15,415 to evaluate on.
@pytest.mark.parametrize(
    ("topology", "augment", "place", "gigabytes"),
    [
        ("v5e:2x4", "none", "device", 44.0),
        ("v5e:2x4", "flip", "host", 76.9),
        ("v4:2x2x1", "none", "device", 44.0),
        ("v4:2x2x1", "flip", "host", 76.9),
        ("h100", "none", "host", 44.0),
        ("h100", "flip", "host", 76.9),
    ],
)
def test_fashioniq_is_planned_without_a_compiler(topology, augment, place, gigabytes):
    config = RunConfig.of(fiq.get_config()).with_changes({"data.augment": augment})
    machine = chips.parse_topology(topology, host_memory=256 if topology == "h100" else None)
    (plan,), misfits = run.plan_config(config, [machine], names=["none"])
    (images,) = plan.stored
    assert (images.place, round(images.nbytes / GB, 1)) == (place, gigabytes)
    assert plan.facts == ()
    assert misfits == []
    assert store_lines.store_json(images)["rows"] == images.rows
    assert images.read_by_host == 224 * 257 * 1408 * 2  # 96 references and 128 targets


@pytest.mark.parametrize("names", [pytest.param(("step",), marks=pytest.mark.slow), ("none",)])
def test_features_that_do_not_fit_are_said(names):
    config = RunConfig.of(fiq.get_config()).with_changes({"features.place": "device"})
    _, (said,) = run.plan_config(config, [chips.parse_topology("h100")], names=names)
    assert said.startswith("h100: the ")
    assert "not fit" in said
    assert "config.features.place=host" in said
    assert "computes" not in said


def test_advice_is_of_what_takes_most():
    config = RunConfig.of(fiq_clip.get_config())
    activations = table.advise(config, facts(temporaries=100), 8)
    assert activations[0].startswith("a smaller config.batch.references")
    assert activations[1:3] == ["config.model.remat=True", "config.batch.chunks=2"]
    chunked = config.with_changes({"batch.chunks": 8})  # all 8 references of a device
    assert not any("chunks" in one for one in table.advise(chunked, facts(temporaries=100), 8))
    assert not any("frozen" in one for one in activations)
    weights = table.advise(config, facts(inputs={"parameters": 100}), 8)
    assert weights[0] == "config.model.frozen_dtype=bfloat16"
    moments = table.advise(config, facts(inputs={"optimiser": 100}), 8)
    assert moments[0] == "config.optimizer.shard_state=True (ZeRO-1)"
    assert "config.model.frozen" in moments[1]
    one = table.advise(config, facts(inputs={"optimiser": 100}), 1)
    assert "config.model.frozen" in one[0]
    bank = table.advise(
        RunConfig.of(shapes.get_config()), facts("bank step", inputs={"bank": 100}), 8
    )
    assert bank[0] == "config.negatives.bank_dtype=bfloat16"
    assert "more chips" in bank[1]
    gallery = table.advise(config, facts("gallery embedding", temporaries=100), 8)
    assert "config.eval.batch_size" in gallery[0]


# ------------------------------------------------------------------- the binary, with the compiler


def plan(*arguments):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(
        [sys.executable, "-m", "dqe_jax.plan", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stderr


# Without blocks it compiles sooner, and has all that is looked at.
SMALL = tuple(f"--config.model.tiny.{part}_depth=0" for part in ("image", "text"))
SMALL += ("--config.model.tiny.composer_depth=1",)
SMOKE = ("--config=configs/shapes.py:smoke", *SMALL)


def plan_to(file, *arguments):
    status, said = plan(*SMOKE, "--per_chip_references=2", f"--output={file}", *arguments)
    assert status == 0, said
    return said, json.loads(file.read_text())


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """All programs with a bank on 8 chips, and lowered for GPUs: what is said, and the JSON."""
    file = tmp_path_factory.mktemp("plan") / "facts.json"
    return plan_to(file, "--topology=v5e:2x4,gpu:2", "--config.negatives.pool=bank")


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.slow  # tests of the bank compile the same program for CPUs
def test_mining_at_a_refresh_compiles(tmp_path):
    flags = ("--programs=mining", "--config.negatives.pool=bank", "--quick")
    refresh = "--config.negatives.mining=refresh"
    _, facts = plan_to(tmp_path / "facts.json", "--topology=v5e:2x4", refresh, *flags)
    (mined,) = facts["plans"][0]["programs"]
    assert (mined["name"], mined["fits"], mined["queries"]) == ("mining", True, 1024)


@needs_libtpu
@pytest.mark.tpu
def test_the_table_and_the_json_have_all_programs(planned):
    said, facts = planned
    assert "Not measured" in said
    names = ["step", "bank step", "bank refresh", "gallery embedding"]
    slices = re.split(r"^(\S+): \d+ chips, \d+ references$", said, flags=re.M)
    tables = dict(zip(slices[1::2], slices[2::2]))
    for one, devices in zip(facts["plans"], (8, 2)):
        lines = tables[one["topology"]].split("\n")
        assert one["devices"] == devices
        assert one["references"] == 2 * devices
        assert [p["name"] for p in one["programs"]] == names
        for p in one["programs"]:
            # Of memory, and of cost.
            assert sum(line.startswith(f"{p['name']}  ") for line in lines) == 2
            assert p["flops"] > 0
            assert p["inputs"]["batch"] > 0
    for p in facts["plans"][0]["programs"]:
        assert p["fits"]
        # The exchange of tokens takes turns until all are sent: hardly ever more than one.
        assert p["loops_unknown"] == (p["name"] == "bank step")
        assert p["needed"] >= p["arguments"] + p["temporaries"] + p["resident"]
        assert p["memory"] == 16 * 2**30
        assert 0 < p["estimated_mfu"] < 1
        assert p["estimated_examples_per_second"] > 0
    step = facts["plans"][0]["programs"][0]
    assert step["arguments"] >= sum(step["inputs"].values())
    assert step["inputs"]["optimiser"] > 2 * step["inputs"]["parameters"] - 64
    assert step["temporaries"] > 0
    for p in facts["plans"][1]["programs"]:
        assert p["fits"] is None
        assert p["estimated_examples_per_second"] is None


@needs_libtpu
@pytest.mark.tpu
def test_only_the_collectives_of_the_method_are_compiled(planned):
    # The pool and what is mined are gathered; their gradients, those of the parameters and sums of
    # the loss are added up (scattered where the compiler finds that cheaper). Candidates from a
    # bank go to the devices that decide on their queries. Nothing else moves.
    programs = planned[1]["plans"][0]["programs"]
    for p in programs:
        allowed = {"all-gather", "all-reduce", "reduce-scatter"}
        allowed |= {"all-to-all"} if p["name"] == "bank step" else set()
        assert set(p["collectives"]) <= allowed
    by_name = {p["name"]: p["collectives"] for p in programs}
    assert {"all-gather", "all-reduce"} <= set(by_name["step"])
    assert by_name["bank refresh"] == {}


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.slow
def test_traffic_of_the_pool_grows_no_faster_than_the_global_batch(planned, tmp_path):
    # Of the step without a bank. What mining a bank at every step exchanges grows with the batch
    # times the devices; see docs/how-to/planning.md.
    said, facts = plan_to(
        tmp_path / "facts.json", "--topology=v5e:4x8", "--programs=step", "--quick"
    )
    assert "--quick" in said.splitlines()[-1]
    few, many = planned[1]["plans"][0]["programs"][0], facts["plans"][0]["programs"][0]
    assert many["estimated_seconds"] is None

    def of_pool(program, chips):
        """Bytes sent beside the gradients, which do not grow: all parameters train."""
        gradients = 2 * (chips - 1) / chips * program["inputs"]["parameters"]
        return program["sent"] - gradients

    assert 0 < of_pool(few, 8) < of_pool(many, 32)
    # 4 times the batch; a ring of 32 sends 31/32 of what it gathers, one of 8 sends 7/8.
    assert of_pool(many, 32) <= 4 * (31 / 32) / (7 / 8) * of_pool(few, 8)


@needs_libtpu
@pytest.mark.tpu
@pytest.mark.slow
def test_a_sharded_optimizer_takes_an_eighth_and_sends_as_much(tmp_path):
    file = tmp_path / "facts.json"
    flags = ("--topology=v5e:2x4,gpu:8", "--programs=step", "--quick", f"--output={file}")
    sharded = "--config.optimizer.shard_state=True"
    status, said = plan(
        "--config=configs/shapes.py", *SMALL, sharded, "--per_chip_references=2", *flags
    )
    assert status == 0, said
    step, lowered = (one["programs"][0] for one in json.loads(file.read_text())["plans"])
    weights = step["inputs"]["parameters"]
    # Two moments of each; small arrays are not sharded, and slices of large ones are padded.
    assert weights / 4 < step["inputs"]["optimiser"] < 1.5 * weights / 4
    assert step["inputs"] == lowered["inputs"]
    assert step["fits"]
    assert {"all-gather", "reduce-scatter"} <= set(step["collectives"])
    # The sum of the gradients of all parameters takes 2 * 7 / 8 of their bytes.
    assert step["sent"] < 1.2 * 2 * 7 / 8 * weights


@pytest.mark.slow
@needs_libtpu
@pytest.mark.tpu
def test_what_does_not_fit_ends_with_status_1_and_advice():
    status, said = plan(
        *SMOKE, "--topology=v5e:2x4", "--per_chip_references=4096", "--programs=step"
    )
    assert status == 1, said
    last = said.splitlines()[-1]
    assert last.startswith("v5e:2x4: the step does not fit: it needs ")
    assert "float32[16384,163840]" in last
    assert "a smaller config.batch.references (now 32768) or more chips" in last


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--topology=v7:2x2"], "error: --topology=v7:2x2: give a chip and the shape of a slice"),
        (["--topology=gpu:3"], "error: config.batch.references is 8: it must be a multiple of"),
        (["--topology=gpu", "--programs=all"], "error: --programs=all: give some of step, bank"),
        (["--topology=h999"], "error: --topology=h999: give a chip and the shape of a slice"),
        (["--topology=h100", "--host_memory=0"], "error: --host_memory=0: give GB of memory"),
        (["--topology=gpu", "--gpu_memory=-1"], "error: --gpu_memory=-1: give GB of memory"),
        (["--topology=gpu", "--output=none/x.json"], "error: --output=none/x.json: there is no"),
    ],
)
def test_errors_are_one_sentence(arguments, words):
    done = run_module("dqe_jax.plan", *SMOKE, *arguments, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == 1


@needs_libtpu
@pytest.mark.tpu
def test_a_shape_that_is_no_slice_is_refused():
    status, said = plan(*SMOKE, "--topology=v5e:3x5")
    assert status == 2
    assert "the TPU compiler knows no such slice" in said
