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
_WORD = r"[^\W\d_](?:[^\W_]|[\u0300-\u036f]|_(?=\w))*"
_JOINED = rf"(?:{_WORD}|\d+(?:[^\W_])*)"
_CLITIC = r"(?:'|\u2019)(?:[sSmMdD]|re|RE|ve|VE|ll|LL)(?![^\W_])"

_TOKEN = re.compile(
    "|".join(
        [
            r"(?P<tag></?[A-Za-z!?][^<>\r\n]*>)",
            r"(?P<entity>&(?:amp|AMP);)",
            r"(?P<url>(?i:https?)://[^\s\"<>|()]*[^\s\"<>|().,;:!?'-]|"
            r"www\.[^\s\"<>|()]*[^\s\"<>|().,;:!?'-])",
            r"(?P<email>[A-Za-z0-9][^\s\"<>|()\u00a0]*@(?:[^\s\"<>|().\u00a0]+\.)+[A-Za-z]{2,})",
            r"(?P<handle>[#@][A-Za-z_][A-Za-z0-9_]*)",
            r"(?P<smiley>[:;8=][-']?[()DPdp](?![A-Za-z0-9]))",
            # "cannot" and its kind are two words.
            r"(?P<pair>(?i:(?P<first>can)(?P<second>not)|(?:gon|wan)na|gotta|gimme|lemme)(?![^\W_]))",
            r"(?P<tis>(?i:'t(?=is(?![^\W_])|was(?![^\W_]))))",
            # Words that begin with an apostrophe or hold one.
            r"(?P<apostrophe>(?i:'(?:em|til|cause|cuz|n)(?![^\W_])'?|o'clock|ma'am|hallowe'en|[dlo]'[a-z]+|"
            r"'?\d\ds(?![^\W_]))|'\d\ds?(?![^\W_]))",
            r"(?P<negated>[^\W\d_]+?(?=(?i:n't)(?![^\W_])))",
            r"(?P<not>(?i:n't)(?![^\W_]))",
            r"(?P<yall>(?i:y')(?=(?i:all)(?![^\W_])))",
            rf"(?P<clitic>{_CLITIC})",
            r"(?P<then>(?i:'n)(?![^\W_]))",
            rf"(?P<abbreviation>(?i:{_ABBREVIATIONS})\.(?![^\W\d_])|"
            rf"(?i:{_BEFORE_NUMBERS})\.(?=\s*\d))",
            r"(?P<acronym>[A-Za-z](?:\.[A-Za-z])+(?:\.(?:-[^\W_]+)*|(?![^\W_])))",
            r"(?P<initial>[A-Za-z]\.(?![^\W_]))",
            r"(?P<money>\$|\u00a3|\u20ac|\u00a2)",
            r"(?P<fraction>[\u00bc\u00bd\u00be])",
            r"(?P<time>\d+(?::\d+)+(?=[A-Za-z]))",
            r"(?P<mixed>\d+[ \u00a0]\d+/\d+(?![\d/]))",
            rf"(?P<number>[-+]?\d*(?:[.,:/-]?\d+)+(?:[^\W\d_][^\W_]*)?(?:[-/]{_JOINED})*)",
            rf"(?P<word>{_WORD}(?:[.!?](?={_WORD}){_WORD}|[-/&](?={_JOINED}){_JOINED})*)",
            r"(?P<dots>\.{2,}|\u2026|(?:\.\s){2,}\.)",
            r"(?P<shout>[?!]+)",
            r"(?P<dash>-{2,}|[\u2013\u2014\u2015])",
            r"(?P<quote>''|``|[\"\u201c\u201d\u2018\u2019'`\u00ab\u00bb])",
            r"(?P<other>\S)",
        ]
    )
)
_WRITTEN = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u00a3": "#", "\u20ac": "$", "\u00a2": "cents",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4",
}  # fmt: skip


def ptb_tokens(caption: str) -> list[str]:
    """Lower-case tokens of one caption, punctuation left out.

    Args:
        caption: One line of text; line breaks count as spaces.
    """
    tokens: list[str] = []
    for match in _TOKEN.finditer(caption.replace("\n", " ")):
        kind, text = match.lastgroup, match.group()
        if kind == "second":  # the last named group of a pair is inside it
            kind = "pair"
        if kind == "pair":
            tokens += [text[:3], text[3:]]
        elif kind == "mixed":  # "3 1/2" is one token, joined by a no-break space
            tokens.append(text.replace(" ", "\u00a0"))
        elif kind == "entity":
            tokens.append("&")
        elif kind == "smiley":
            tokens.append(text.replace("(", "-lrb-").replace(")", "-rrb-"))
        elif kind not in ("dots", "dash", "quote"):
            tokens.append(_WRITTEN.get(text, text))
    return [token.lower() for token in tokens if token not in _PUNCTUATION]
