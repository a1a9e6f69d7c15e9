"""Read what an expression names: its head nouns and the attributes of each, by plain rules for English.

The rules are lists of words and need no library. A text is cut into phrases at prepositions, clauses, commas and "and";
the head of a phrase is its last word that is no colour, place, number or the like. "The two red cars parked on the left"
names a car. So does "cars left", as RefCOCO words it. What the rules do not know counts as a noun.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|[,;:()/&]")

# Words after which another phrase begins: what a thing is near, does, has or wears.
BOUNDARIES = _set(
    """about above across after against along among around as at be been before behind being below beneath beside besides
    between beyond by closest cut dressed down during farthest for from furthest had has have having in inside into is are
    was were like near nearest next not off on onto out outside over past per seated since than that through to toward
    towards under underneath up upon until via what when where which while who whom whose with within without"""
)
# Words that join things of equal rank.
JOINTS = frozenset({"and", "or", "plus", ",", ";", "&", "/"})
# Words that name nothing and say nothing about a thing by itself: articles, numbers, places, comparisons.
IDLE = _set(
    """a an the this these those its it he she him they them you me we us his her hers their theirs my our your all any both each either every few many most
    much none only other others another same several single some such very most more less least just also almost partially
    partly fully completely slightly half whole entire there here one's no
    zero two three four five six seven eight nine ten eleven twelve first second third fourth fifth sixth 1st 2nd 3rd 4th 5th
    last next-to-last far close closer nearer farther further furthermost
    left right top bottom upper lower middle center centre centered front back rear leftmost rightmost topmost bottommost
    left-most right-most uppermost lowermost far-left far-right l r lft rt mid foreground background corner edge side end
    big bigger biggest large larger largest huge small smaller smallest little tiny tall taller tallest short shorter
    shortest long longer longest high higher highest low lower lowest old older oldest young younger youngest new wide thin
    thick fat skinny light dark bright visible blurry facing ( ) :"""
)  # fmt: skip
# Nouns that could name anything, or that name a whole class of things.
GENERIC = _set(
    """thing object item one shape figure stuff something anything somebody someone everything area region spot part portion
    piece place image picture photo animal vehicle food fruit vegetable furniture clothing clothes device tool toy appliance
    equipment plant structure machine container material pattern color colour kind type guess it"""
)
# Nouns that only count or portion what stands after their "of".
MEASURES = _set(
    """piece slice group pair bunch part bit row pile stack set kind type half couple lot number side edge end corner front
    back top bottom portion section line herd flock crowd team handful rest"""
)
# Words for one thing: the first of a line stands for the others.
_SAME = """person man woman guy dude lady girl boy kid child baby toddler infant adult people human gentleman male female
 player batter catcher pitcher umpire referee skier snowboarder surfer skater skateboarder rider driver cook chef waiter
 waitress officer policeman cop soldier worker cowboy bride groom mom mother dad father son daughter brother sister friend
 spectator pedestrian passenger dancer doctor nurse teacher student teen teenager fella bro gal grandma grandpa
 grandmother grandfather husband wife couple crowd team audience fan goalie hitter runner cyclist biker motorcyclist
couch sofa loveseat
tv television screen monitor
bicycle bike cycle
motorcycle motorbike
airplane plane aeroplane aircraft jet jetliner
car automobile sedan suv taxi cab van minivan
truck lorry pickup
laptop notebook computer
phone cellphone telephone smartphone mobile
cup mug
glasses eyeglasses spectacles
donut doughnut
dog puppy pup doggy doggie
cat kitten kitty
cow bull calf cattle ox steer
sheep lamb ram
horse pony foal
bag purse handbag backpack luggage suitcase
fridge refrigerator
stove oven range
rug carpet mat
bush shrub hedge"""
SAME = {word: line.split()[0] for line in re.sub(r"\n ", " ", _SAME).splitlines() for word in line.split()}
# kind of attribute -> its values; the words of a value are near enough to be taken for one another. A thing that has one
# value is taken not to have another one of the same kind. Size, place and age are relative, so they are not among them.
_ATTRIBUTES = {
    "colour": """red maroon crimson scarlet burgundy|orange|yellow gold golden blond blonde|green olive lime|blue navy|
        cyan teal turquoise aqua|purple violet lavender lilac|pink magenta|brown tan beige khaki|black|white cream ivory|
        gray grey silver""",
    "pattern": "striped stripe stripes|spotted dotted polka-dot|checkered checked plaid|floral flowered|plain solid",
    "material": "wooden wood|metal metallic steel|plastic|leather|brick|stone concrete|paper cardboard|ceramic porcelain",
    "posture": "sitting seated|standing|lying laying|kneeling|crouching squatting|walking|running|jumping",
    "state": "open opened|closed shut|empty|full|broken|parked",
}
ATTRIBUTES = {
    word: (kind, number)
    for kind, values in _ATTRIBUTES.items()
    for number, value in enumerate(values.split("|"))
    for word in value.split()
}
# Words of ATTRIBUTES that name a thing where no other word does.
_ALSO_NOUNS = _set("orange lime olive stone brick paper wood metal gold silver stripe stripes")
# Nouns in -ing; every other word in -ing says what the thing before it does.
_NOUNS_IN_ING = _set(
    """awning bedding being building ceiling clothing crossing dressing earring evening filling fencing flooring frosting
    icing king lettering lighting morning painting parking piping pudding railing ring siding sling spring stocking string
    stuffing swing thing topping wedding wing wing writing"""
)
_IRREGULAR = dict(
    pair.split(":")
    for pair in _set(
        """men:man women:woman people:person persons:person children:child kids:kid feet:foot teeth:tooth mice:mouse
    geese:goose oxen:ox knives:knife wives:wife lives:life leaves:leaf wolves:wolf calves:calf shelves:shelf loaves:loaf
    halves:half scarves:scarf hooves:hoof elves:elf thieves:thief buses:bus gases:gas lenses:lens dice:die
    movies:movie cookies:cookie pies:pie ties:tie zombies:zombie selfies:selfie brownies:brownie smoothies:smoothie
    hoodies:hoodie doggies:doggie veggies:veggie potatoes:potato tomatoes:tomato heroes:hero mangoes:mango echoes:echo
    glasses:glasses pants:pants jeans:jeans shorts:shorts scissors:scissors trousers:trousers clothes:clothes
    sunglasses:sunglasses binoculars:binoculars skis:ski tennis:tennis canvas:canvas christmas:christmas series:series
    species:species sheep:sheep deer:deer fish:fish this:this its:its yes:yes lens:lens gas:gas"""
    )
)


def singular(word: str) -> str:
    """Return the singular of an English noun; other words stay as they are.

    >>> [singular(word) for word in ("circles", "buses", "cherries", "women", "glass", "benches")]
    ['circle', 'bus', 'cherry', 'woman', 'glass', 'bench']
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and len(word) > 5:
        return word[:-2] + "an"
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(("sses", "zzes", "xes", "ches", "shes")) else word[:-1]


def name_of(word: str) -> str:
    """Return the name under which two nouns are compared: the singular, and one word for those that mean one thing.

    >>> name_of("women") == name_of("guy"), name_of("sofas")
    (True, 'couch')
    """
    one = singular(re.sub(r"['’]s?$", "", word))
    if one not in SAME and one.endswith(("man", "woman")) and one != "human":
        return SAME["man"]  # a fireman, a snowwoman
    return SAME.get(one, one)


@dataclass(frozen=True)
class Part:
    """One of the things that an expression joins by "and".

    Args:
        head: Its noun as `name_of` gives it; "" if the expression does not name it ("second from left").
        attributes: (kind, noun that carries it; "" for the thing itself) -> the numbers of the values.
    """

    head: str
    attributes: Mapping[tuple[str, str], frozenset[int]] = field(default_factory=dict)

    @property
    def is_generic(self) -> bool:
        """Return whether its noun does not tell what it is."""
        return not self.head or self.head in GENERIC

    @property
    def values(self) -> frozenset[tuple[str, int]]:
        """Return (kind, value) of all attributes, whatever carries them."""
        return frozenset((kind, value) for (kind, _), values in self.attributes.items() for value in values)

    def differs_in_attribute(self, other: Part) -> bool:
        """Return whether both state an attribute of one kind, of one carrier, and have no value of it in common."""
        return any(values.isdisjoint(other.attributes.get(key, values)) for key, values in self.attributes.items())

    def excludes(self, other: Part) -> bool:
        """Return whether a thing that is this cannot be the other: it has another noun, or an attribute's other value."""
        is_another = not self.is_generic and not other.is_generic and self.head != other.head
        return is_another or self.differs_in_attribute(other)


@dataclass(frozen=True)
class Phrase:
    """What an expression names.

    Args:
        parts: The things that it joins; at least one.
        nouns: All words that may name a thing, as `name_of` gives them.
    """

    parts: tuple[Part, ...]
    nouns: frozenset[str]

    @property
    def heads(self) -> frozenset[str]:
        """Return the head nouns, without "" for a thing that is not named."""
        return frozenset(part.head for part in self.parts if part.head)


def _is_noun(word: str) -> bool:
    return word not in IDLE and word not in ATTRIBUTES and word not in BOUNDARIES and word not in JOINTS


def _acts(word: str) -> bool:
    """Return whether a word says what the noun before it does: "riding", but not "building"."""
    return word.endswith("ing") and len(word) > 4 and singular(word) not in _NOUNS_IN_ING


@lru_cache(maxsize=65536)
def read_phrase(text: str) -> Phrase:
    """Return what an expression names.

    >>> [part.head for part in read_phrase("the men with red hats and a slice of pizza").parts]
    ['person', 'pizza']
    >>> read_phrase("the man with a red hat").parts[0].attributes
    {('colour', 'hat'): frozenset({0})}
    """
    parts: list[tuple[str, dict[tuple[str, str], set[int]]]] = []
    nouns: set[str] = set()
    for is_side, words in _segments(text):
        named = [word for word in words if _is_noun(word)]
        if not named:
            named = [word for word in words[-1:] if word in _ALSO_NOUNS]
        head = name_of(named[-1]) if named else ""
        nouns.update(map(name_of, named))
        if is_side and parts:
            carrier = head
        elif named or not parts:
            parts.append((head, {}))
            carrier = ""
        else:  # "cat black": an attribute after its noun
            carrier = ""
        for word in words:
            if word in ATTRIBUTES and not (len(words) == 1 and named):
                kind, value = ATTRIBUTES[word]
                parts[-1][1].setdefault((kind, carrier), set()).add(value)
    read = [Part(head, {key: frozenset(values) for key, values in attributes.items()}) for head, attributes in parts]
    return Phrase(tuple(read) or (Part(""),), frozenset(nouns))


def _segments(text: str) -> list[tuple[bool, list[str]]]:
    """Return the phrases of a text as (whether it only describes the one before, its words)."""
    segments: list[tuple[bool, list[str]]] = []
    words: list[str] = []
    is_side = False

    def close(next_is_side: bool) -> None:
        nonlocal words, is_side
        if words:
            segments.append((is_side, words))
        words, is_side = [], next_is_side

    for word in WORD.findall(text.lower()):
        has_noun = any(map(_is_noun, words))
        if word == "of":
            last = next((one for one in reversed(words) if _is_noun(one)), None)
            if last is None or singular(last) in MEASURES | GENERIC:
                words = [one for one in words if one in ATTRIBUTES]  # "one of the dogs", "a slice of pizza"
            else:
                close(next_is_side=True)
        elif word in JOINTS:
            if has_noun or word == ",":
                close(next_is_side=False)  # else "black and white dog" goes on
        elif word in BOUNDARIES and not (word in ATTRIBUTES and not has_noun):
            close(next_is_side=True)
            if word in ATTRIBUTES:
                segments.append((False, [word]))  # "man seated": of the thing itself
        elif _acts(word) and has_noun:
            close(next_is_side=False)
            if word in ATTRIBUTES:
                segments.append((False, [word]))
            is_side = True
        elif word in ATTRIBUTES and has_noun and not is_side:
            close(next_is_side=False)  # "girl blue shirt"
            words = [word]
        else:
            words.append(word)
    close(next_is_side=False)
    return segments


@dataclass(frozen=True)
class Categories:
    """The categories of a data set's annotations, beside its texts.

    Args:
        of_image: Image id -> names of the categories of everything that is annotated in the image.
        of_text: Text in lower case -> names of the categories of what it names, in any image.
    """

    of_image: Mapping[str, frozenset[str]] = field(default_factory=dict)
    of_text: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, of_image: Mapping[str, Iterable[str]], of_text: Mapping[str, Iterable[str]]) -> Categories:
        """Return categories that nothing changes any more."""
        return cls(*({key: frozenset(names) for key, names in part.items()} for part in (of_image, of_text)))

    @classmethod
    def united(cls, several: Iterable[Categories]) -> Categories:
        """Return the categories of several data sets together."""
        of_image: dict[str, frozenset[str]] = {}
        of_text: dict[str, frozenset[str]] = {}
        for one in several:
            for target, source in ((of_image, one.of_image), (of_text, one.of_text)):
                for key, names in source.items():
                    target[key] = target.get(key, frozenset()) | names
        return cls(of_image, of_text)
