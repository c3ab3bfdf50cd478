"""Penn Treebank tokens of a caption, as the official caption scorer cuts them.

COCO's scorer runs the Java class PTBTokenizer of Stanford CoreNLP 3.4.1 with `-preserveLines
-lowerCase` and drops punctuation tokens. CIDEr depends on where it cuts ("isn't" is "is n't",
"50%" is "50 %", "p.m." keeps its points), so captions must be cut alike. No maintained package does
it without a Java machine; the rules below were written from the behaviour of that program and are
tested against what it printed. Two habits of the official scorer are kept: brackets become
"-lrb-" and "-rrb-" and stay (its list of punctuation has them in capitals, after the lower-casing),
and "?!" stays where "?" and "!" go.
"""

import re

# fmt: off
_PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
     "...", ";"]
)
# fmt: on
# Abbreviations that keep their point: months and days, titles, companies, streets, states. The last
# line's words keep it before a number alone.
_ABBREVIATIONS = (
    "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tues?|Wed|Thu|Thurs|Fri|"
    "Mr|Mrs|Ms|Drs?|Prof|Rev|Hon|Gen|Sen|Rep|Gov|Lt|Col|Sgt|Capt|Maj|Cmdr|Messrs|Pres|Supt|Adm|"
    "Brig|Cpl|Pvt|Det|Insp|Jr|Sr|Esq|Alex|Wm|Jos|Ph\\.D|Md|"
    "Inc|Cos?|Corp|Ltd|Bros|Assn|Assoc|Bhd|Cie|Pty|Plc|Dept|Univ|Mfg|Intl|Natl|Elec|Invt|Tel|Ext|"
    "St|Ste|Ave|Blvd|Rd|Mt|Ft|Ct|Sq|Bldg|vs|etc|al|seq|cf|est|"
    "Ala|Ariz|Ark|Calif|Colo|Conn|Dak|Del|Fla|Ga|Ill|Ind|Kans?|Ky|La|Mass|Mich|Minn|Miss|Mo|Mont|"
    "Neb|Nev|Okla|Ore|Pa|Penn|Tenn|Tex|Va|Vt|Wash|Wisc?|Wyo"
)
_BEFORE_NUMBERS = "Nos?|Figs?|Art|pp|op|ca"
# A letter or digit; raised and lowered ones and fractions are tokens of their own.
_SMALL = "\u00b2\u00b3\u00b9\u2070-\u209c\u00bc-\u00be\u2150-\u215e"
_CHARACTER = rf"[^\W_{_SMALL}]"
_LETTER = rf"[^\W\d_{_SMALL}]"
_APOSTROPHE = "['\u2019]"
_HYPHEN = "[-\u2010\u2011]"
_WORD = rf"{_LETTER}(?:{_CHARACTER}|[\u0300-\u036f]|_(?=[^\W_]))*"
_JOINED = rf"(?:{_WORD}|\d+{_CHARACTER}*)"
_END = rf"(?!{_CHARACTER})"
_CLITIC = rf"{_APOSTROPHE}(?:[sSmMdD]|re|RE|ve|VE|ll|LL){_END}"

_TOKEN = re.compile(
    "|".join(
        [
            r"(?P<tag></?[A-Za-z!?][^<>\r\n=]*>)",
            r"(?P<entity>&(?i:amp|lt|gt|quot|apos|nbsp);)",
            r"(?P<url>(?i:https?)://[^\s\"<>|()]*[^\s\"<>|().,;:!?'-]|"
            r"www\.[^\s\"<>|()]*[^\s\"<>|().,;:!?'-])",
            r"(?P<email>[A-Za-z0-9][^\s\"<>|()\u00a0]*@(?:[^\s\"<>|().\u00a0]+\.)+"
            r"[^\s\"<>|().\u00a0]{2,})",
            r"(?P<handle>[#@][A-Za-z_][A-Za-z0-9_]*)",
            r"(?P<smiley>[:;=][-']?[()DPdp\[\]](?![A-Za-z0-9])|[:=]-?\\|:O(?![A-Za-z0-9])|>:\)|"
            r"-_-|\^_\^|>_<)",
            # "cannot" and its kind are two words.
            rf"(?P<pair>(?i:(?P<first>can)(?P<second>not)|(?:gon|wan)na|gotta|gimme|lemme){_END})",
            rf"(?P<tis>(?i:'t(?=is{_END}|was{_END})))",
            # Words that begin with an apostrophe or hold one.
            rf"(?P<apostrophe>(?i:{_APOSTROPHE}(?:em|til|cause|cuz|n){_END}{_APOSTROPHE}?|"
            rf"o{_APOSTROPHE}clock|ma{_APOSTROPHE}am|hallowe{_APOSTROPHE}en|"
            rf"(?<!{_CHARACTER})(?:[cdlo]|qu){_APOSTROPHE}[a-z]+|'?\d\ds{_END})|"
            rf"{_APOSTROPHE}\d\ds?{_END})",
            rf"(?P<negated>{_LETTER}+?(?=(?i:n{_APOSTROPHE}t){_END}))",
            rf"(?P<not>(?i:n{_APOSTROPHE}t){_END})",
            rf"(?P<yall>(?i:y{_APOSTROPHE})(?=(?i:all){_END}))",
            rf"(?P<clitic>{_CLITIC})",
            rf"(?P<then>(?i:'n){_END})",
            rf"(?P<abbreviation>(?i:{_ABBREVIATIONS})\.(?!{_LETTER})|"
            rf"(?i:{_BEFORE_NUMBERS})\.(?=\s*\d))",
            rf"(?P<acronym>[A-Za-z](?:\.[A-Za-z])+(?:\.(?:-[^\W_]+)*|{_END}))",
            rf"(?P<initial>[A-Za-z]\.{_END})",
            r"(?P<money>(?:US|HK|NZ|AU|CA|[ACRSUZ])\$|\$|\u00a3|\u20ac|\u00a2)",
            rf"(?P<language>[CcFf]#{_END}|[Cc]\+\+)",
            r"(?P<fraction>[\u00bc-\u00be\u2153\u2154])",
            r"(?P<time>\d+(?::\d+)+(?=[A-Za-z]))",
            r"(?P<mixed>\d+[ \u00a0]\d+/\d+(?![\d/]))",
            # Telephone numbers hold their spaces.
            r"(?P<telephone>(?<!\d)(?:\(\d{2,3}\)[ \u00a0]?|\d{2,4}[ \u00a0])"
            r"\d{3,4}[ \u00a0-]\d{3,5}(?!\d))",
            rf"(?P<number>[-+]?\d*(?:[.,:/-]?\d+)+(?:{_LETTER}{_CHARACTER}*)?"
            rf"(?:(?:{_HYPHEN}|/){_JOINED})*)",
            r"(?P<firm>[A-Z]+(?:&[A-Z]+)+)",
            rf"(?P<word>{_WORD}(?:[.!?](?={_WORD}){_WORD}|(?:{_HYPHEN}|/)(?={_JOINED}){_JOINED})*)",
            r"(?P<dots>\.{2,}|\u2026|(?:\.\s){2,}\.)",
            r"(?P<shout>[?!]+)",
            r"(?P<dash>-{2,}|[\u2010\u2011\u2013-\u2015])",
            r"(?P<quote>''|``|[\"\u201c\u201d\u2018\u2019'`\u00ab\u00bb])",
            r"(?P<run>\*+|_+)",
            r"(?P<other>\S)",
        ]
    )
)
_WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u00a3": "#", "\u20ac": "$", "\u00a2": "cents",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
}  # fmt: skip
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">"}
# What the program cannot read is not there: signs above U+FFFF (emoji), invisible and some other
# marks. A soft hyphen joins.
_UNREADABLE = re.compile("[\U00010000-\U0010ffff\u200b-\u200f\ufe0f\ufeff\u2039\u203a\u20a9\u20b9]")


def ptb_tokens(caption: str) -> list[str]:
    """Lower-case tokens of one caption, punctuation left out.

    Args:
        caption: One line of text; line breaks count as spaces.
    """
    tokens: list[str] = []
    text = _UNREADABLE.sub(" ", caption.replace("\n", " ")).replace("\u00ad", "")
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "second":  # the last named group of a pair is inside it
            kind = "pair"
        if kind == "pair":
            tokens += [token[:3], token[3:]]
        elif kind in ("mixed", "telephone", "tag"):  # one token, joined by no-break spaces
            tokens.append(_brackets(token.replace(" ", "\u00a0")))
        elif kind == "entity":
            tokens.append(_ENTITIES.get(token.lower(), "''"))
        elif kind == "smiley":
            tokens.append(_brackets(token))
        elif kind in ("clitic", "not"):
            tokens.append(token.replace("\u2019", "'"))
        elif kind not in ("dots", "dash", "quote"):
            tokens.append(_WRITTEN.get(token, token))
    return [token.lower() for token in tokens if token not in _PUNCTUATION]


def _brackets(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")
