"""Attributes that many tables of products have, and how people speak of them.

The colour, the kind of article, the gender it is made for, its usage and its season.
"""

from __future__ import annotations

from collections.abc import Mapping

from dqe_jax.data.made.grammar import Attribute, with_article

# Words of values that lower case does not give. (one, many) for article types.
_COLOR_WORDS = {"Multi": "multicolour", "Off White": "off-white", "Skin": "skin tone"}
_ARTICLE_WORDS = {
    "Tshirts": ("a t-shirt", "t-shirts"),
    "Ties": ("a tie", "ties"),
    "Scarves": ("a scarf", "scarves"),
    "Trunk": ("a pair of trunks", "trunks"),
    "Ipad": ("an ipad", "ipads"),
    "Churidar": ("a pair of churidar", "churidar"),
    "Bra": ("a bra", "bras"),
    "Perfume and Body Mist": ("a perfume or body mist", "perfumes and body mists"),
    "Necklace and Chains": ("a necklace or chain", "necklaces and chains"),
    "Kajal and Eyeliner": ("a kajal or eyeliner", "kajals and eyeliners"),
    "Foundation and Primer": ("a foundation or primer", "foundations and primers"),
    "Face Wash and Cleanser": ("a face wash or cleanser", "face washes and cleansers"),
    "Face Serum and Gel": ("a face serum or gel", "face serums and gels"),
    "Lounge Tshirts": ("a lounge t-shirt", "lounge t-shirts"),
}
_PAIRS = frozenset(
    (
        *("jeans", "trousers", "shorts", "pants", "leggings", "jeggings", "tights", "capris"),
        *("salwar", "patiala", "dungarees", "stockings", "socks", "briefs", "boxers", "gloves"),
        *("shoes", "heels", "flats", "sandals", "flops", "booties", "laces", "warmers"),
        *("sunglasses", "cufflinks", "suspenders"),
    )
)
_MASS = frozenset(("swimwear", "shapewear", "loungewear", "jewellery", "care", "accessories"))
_GENDER_WORDS = {
    "Men": ("men", "men's"),
    "Women": ("women", "women's"),
    "Boys": ("boys", "boys'"),
    "Girls": ("girls", "girls'"),
    "Unisex": ("both men and women", "unisex"),
}
_USAGE_WORDS = {
    "Casual": ("casual", "everyday wear"),
    "Formal": ("formal", "formal occasions"),
    "Sports": ("sporty", "sports"),
    "Ethnic": ("ethnic", "ethnic wear"),
    "Smart Casual": ("smart casual", "smart casual wear"),
    "Party": ("party", "parties"),
    "Home": ("home", "use at home"),
    "Travel": ("travel", "travelling"),
}


def article_words(value: str) -> tuple[str, str]:
    """An article type in words for one and for many: ("a t-shirt", "t-shirts")."""
    if value in _ARTICLE_WORDS:
        return _ARTICLE_WORDS[value]
    words = value.lower()
    last = words.split(" ")[-1]
    if last in _PAIRS:
        return f"a pair of {words}", words
    if last in _MASS:
        return words, words
    if last.endswith("s") and not last.endswith("ss"):
        if last.endswith("ies"):
            one = words[:-3] + "y"
        elif last.endswith(("sses", "ches", "shes", "xes")):
            one = words[:-2]
        else:
            one = words[:-1]
        return with_article(one), words
    if last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        many = words[:-1] + "ies"
    elif last.endswith(("ss", "ch", "sh", "x")):
        many = words + "es"
    else:
        many = words + "s"
    return with_article(words), many


def _color(value: str) -> Mapping[str, str]:
    return {"word": _COLOR_WORDS.get(value, value.lower())}


def _article(value: str) -> Mapping[str, str]:
    one, many = article_words(value)
    return {"one": one, "many": many}


def _gender(value: str) -> Mapping[str, str]:
    lower = value.lower()
    whom, whose = _GENDER_WORDS.get(value, (lower, lower))
    return {"whom": whom, "a": with_article(whose)}


def _usage(value: str) -> Mapping[str, str]:
    lower = value.lower()
    adjective, noun = _USAGE_WORDS.get(value, (lower, lower))
    return {"adjective": adjective, "noun": noun, "a": with_article(adjective)}


def _season(value: str) -> Mapping[str, str]:
    lower = value.lower()
    return {"word": lower, "a": with_article(lower)}


COLOR = Attribute(
    name="color",
    kind="color",
    noun="colour",
    new=(
        "the same in {new[word]}",
        "in {new[word]}",
        "make it {new[word]}",
        "is {new[word]}",
        "change the colour to {new[word]}",
        "i would like it in {new[word]}",
    ),
    new_and_old=(
        "in {new[word]} instead of {old[word]}",
        "{new[word]} rather than {old[word]}",
        "{new[word]}, not {old[word]}",
        "change the colour from {old[word]} to {new[word]}",
    ),
    words=_color,
)
ARTICLE = Attribute(
    name="article",
    kind="article",
    noun="type of product",
    new=(
        "{new[one]} instead",
        "show me {new[many]} of this style",
        "make it {new[one]}",
        "is {new[one]}",
        "the same look but as {new[one]}",
        "i am looking for {new[many]}",
    ),
    new_and_old=(
        "{new[many]} rather than {old[many]}",
        "{new[one]} instead of {old[one]}",
        "replace the {old[many]} with {new[many]}",
        "is {new[one]}, not {old[one]}",
    ),
    words=_article,
)
GENDER = Attribute(
    name="gender",
    kind="gender",
    noun="gender",
    new=(
        "the same but for {new[whom]}",
        "for {new[whom]}",
        "{new[a]} version",
        "made for {new[whom]}",
        "should be for {new[whom]}",
    ),
    new_and_old=(
        "for {new[whom]} instead of {old[whom]}",
        "{new[a]} version rather than {old[a]} one",
        "for {new[whom]}, not for {old[whom]}",
    ),
    words=_gender,
)
USAGE = Attribute(
    name="usage",
    kind="usage",
    noun="purpose",
    new=(
        "{new[a]} one",
        "more {new[adjective]}",
        "meant for {new[noun]}",
        "better suited to {new[noun]}",
        "in {new[a]} style",
    ),
    new_and_old=(
        "for {new[noun]} rather than {old[noun]}",
        "{new[adjective]} instead of {old[adjective]}",
        "less {old[adjective]} and more {new[adjective]}",
    ),
    words=_usage,
)
SEASON = Attribute(
    name="season",
    kind="season",
    noun="season",
    new=(
        "for {new[word]}",
        "from the {new[word]} collection",
        "{new[a]} version",
        "to wear in {new[word]}",
        "made for the {new[word]} season",
    ),
    new_and_old=(
        "for {new[word]} instead of {old[word]}",
        "{new[word]} wear, not {old[word]} wear",
        "from the {new[word]} rather than the {old[word]} collection",
    ),
    words=_season,
)
