"""Modification texts of `fashion_products`: the words by which an attribute changes.

Templates give several wordings for each attribute, with or without the old value. A text is in
lower case, and depends on the random generator that the caller hands in.
"""

from __future__ import annotations

import random

Values = tuple[str, ...]  # Values of ATTRIBUTES, in their order.
NA = "NA"
# Columns that a query may change, in the order of the 5-tuples, and the kind of such a query.
KINDS = {
    "baseColour": "color",
    "articleType": "article",
    "gender": "gender",
    "usage": "usage",
    "season": "season",
}
TWO_CHANGES = "two changes"
ATTRIBUTES = tuple(KINDS)

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
# Templates by column: those that state the new value only, and those that state the old one too.
_NEW = {
    "baseColour": (
        "the same in {new[word]}",
        "in {new[word]}",
        "make it {new[word]}",
        "is {new[word]}",
        "change the colour to {new[word]}",
        "i would like it in {new[word]}",
    ),
    "articleType": (
        "{new[one]} instead",
        "show me {new[many]} of this style",
        "make it {new[one]}",
        "is {new[one]}",
        "the same look but as {new[one]}",
        "i am looking for {new[many]}",
    ),
    "gender": (
        "the same but for {new[whom]}",
        "for {new[whom]}",
        "{new[a]} version",
        "made for {new[whom]}",
        "should be for {new[whom]}",
    ),
    "usage": (
        "{new[a]} one",
        "more {new[adjective]}",
        "meant for {new[noun]}",
        "better suited to {new[noun]}",
        "in {new[a]} style",
    ),
    "season": (
        "for {new[word]}",
        "from the {new[word]} collection",
        "{new[a]} version",
        "to wear in {new[word]}",
        "made for the {new[word]} season",
    ),
}
_NEW_AND_OLD = {
    "baseColour": (
        "in {new[word]} instead of {old[word]}",
        "{new[word]} rather than {old[word]}",
        "{new[word]}, not {old[word]}",
        "change the colour from {old[word]} to {new[word]}",
    ),
    "articleType": (
        "{new[many]} rather than {old[many]}",
        "{new[one]} instead of {old[one]}",
        "replace the {old[many]} with {new[many]}",
        "is {new[one]}, not {old[one]}",
    ),
    "gender": (
        "for {new[whom]} instead of {old[whom]}",
        "{new[a]} version rather than {old[a]} one",
        "for {new[whom]}, not for {old[whom]}",
    ),
    "usage": (
        "for {new[noun]} rather than {old[noun]}",
        "{new[adjective]} instead of {old[adjective]}",
        "less {old[adjective]} and more {new[adjective]}",
    ),
    "season": (
        "for {new[word]} instead of {old[word]}",
        "{new[word]} wear, not {old[word]} wear",
        "from the {new[word]} rather than the {old[word]} collection",
    ),
}
_NOUNS = {
    "baseColour": "colour",
    "articleType": "type of product",
    "gender": "gender",
    "usage": "purpose",
    "season": "season",
}
_UNSTATED = ("with no stated {}", "one whose {} is not stated", "without any given {}")
_JOINTS = ("{} and {}", "{}, {}", "{}, and also {}", "{}, plus {}")


def _with_article(noun: str) -> str:
    vowel = noun[:1] in tuple("aeiou") and not noun.startswith("uni")
    return f"{'an' if vowel else 'a'} {noun}"


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
        return _with_article(one), words
    if last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        many = words[:-1] + "ies"
    elif last.endswith(("ss", "ch", "sh", "x")):
        many = words + "es"
    else:
        many = words + "s"
    return _with_article(words), many


def _words(attribute: str, value: str) -> dict[str, str]:
    """The forms of a value that the templates of its attribute use."""
    lower = value.lower()
    match attribute:
        case "baseColour":
            return {"word": _COLOR_WORDS.get(value, lower)}
        case "articleType":
            one, many = article_words(value)
            return {"one": one, "many": many}
        case "gender":
            whom, whose = _GENDER_WORDS.get(value, (lower, lower))
            return {"whom": whom, "a": _with_article(whose)}
        case "usage":
            adjective, noun = _USAGE_WORDS.get(value, (lower, lower))
            return {"adjective": adjective, "noun": noun, "a": _with_article(adjective)}
        case _:
            return {"word": lower, "a": _with_article(lower)}


def clause(attribute: str, old: str, new: str, rng: random.Random) -> str:
    """Says in words, chosen by `rng`, that the attribute changes from `old` to `new`."""
    if new == NA:
        return rng.choice(_UNSTATED).format(_NOUNS[attribute])
    templates = _NEW[attribute]
    if old != NA and rng.random() < 0.5:
        templates = _NEW_AND_OLD[attribute]
    # Not _words(old) if it is NA: no template then uses it.
    return rng.choice(templates).format(new=_words(attribute, new), old=_words(attribute, old))


def changes(old: Values, new: Values) -> tuple[int, ...]:
    """Positions in `ATTRIBUTES` of the values that differ."""
    return tuple(i for i, (a, b) in enumerate(zip(old, new)) if a != b)


def modification(old: Values, new: Values, rng: random.Random) -> str:
    """The text that turns a product of values `old` into one of values `new`, in lower case."""
    clauses = [clause(ATTRIBUTES[i], old[i], new[i], rng) for i in changes(old, new)]
    rng.shuffle(clauses)
    if len(clauses) == 1:
        return clauses[0]
    return rng.choice(_JOINTS).format(*clauses)
