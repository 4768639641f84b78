"""Which texts ask the same thing: normalised words and near-duplicates. Knows strings only."""

import re
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence


class _Fold(dict[int, str]):
    """A table for str.translate that learns each character once."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        kind = unicodedata.category(char)
        self[code] = " " if kind[0] in "PSZC" else char
        # Chinese and Japanese have no spaces: each sign is a token, else a sentence would be one.
        if kind == "Lo" and unicodedata.east_asian_width(char) == "W" and not "가" <= char <= "힣":
            self[code] = f" {char} "
        return self[code]


_FOLD = _Fold()
_OPTION = re.compile(r"^[ \t]*\(?[A-Z]\)(.*)$", re.MULTILINE)


def normalise(text: str) -> str:
    """Text as groups compare it: NFKC, lower case, every run of other signs one space.

    >>> normalise("  Is it ＯＫ —really?")
    'is it ok really'
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.translate(_FOLD).split()) or folded.strip()


def normalise_question(text: str) -> str:
    """The same for a question; its lettered options are sorted, so their order does not matter.

    >>> normalise_question("Which?\\n (A) No\\n (B) Yes") == normalise_question(
    ...     "Which?\\n (A) Yes\\n (B) No")
    True
    """
    options = sorted(normalise(found) for found in _OPTION.findall(text))
    if len(options) < 2:
        return normalise(text)
    return normalise("\n".join([_OPTION.sub("", text), *options]))


class Sets:
    """Disjoint sets of anything hashable."""

    def __init__(self) -> None:
        self.parent: dict[Hashable, Hashable] = {}

    def find(self, node: Hashable) -> Hashable:
        """The node that stands for the set of this one."""
        parent = self.parent
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(self, a: Hashable, b: Hashable) -> None:
        """Make the sets of both one."""
        self.parent[self.find(a)] = self.find(b)


def near_groups(texts: Sequence[str]) -> list[int]:
    """For each text the first text of its group, under chains of token Jaccard >= 0.8.

    Jaccard is taken of the token sets of the normalised texts. Two sets can reach 0.8 only if
    their rarest tokens meet, so only pairs that share one of those are compared (the prefix filter:
    Bayardo et al. 2007, Scaling Up All Pairs Similarity Search,
    https://doi.org/10.1145/1242572.1242591).

    >>> near_groups(["a b c d e", "Something else", "A b, c d e."])
    [0, 1, 0]
    """
    sets = [frozenset(normalise(text).split()) for text in texts]
    count = Counter(token for tokens in sets for token in tokens)
    first: dict[frozenset[str], int] = {}
    for n, tokens in enumerate(sets):
        first.setdefault(tokens, n)
    union = Sets()
    queue = sorted(first, key=lambda tokens: (len(tokens), first[tokens]))
    sizes = [len(tokens) for tokens in queue]
    index: dict[str, list[int]] = defaultdict(list)
    for n, tokens in enumerate(queue):
        size = sizes[n]
        needed = -(-4 * size // 5)  # whole numbers: 0.8 * 5 must not round
        smallest = bisect_left(sizes, needed, 0, n)
        prefix = sorted(tokens, key=lambda token: (count[token], token))[: size - needed + 1]
        seen: set[int] = set()
        for token in prefix:
            others = index[token]
            seen.update(others[bisect_left(others, smallest) :])
            others.append(n)
        for other in seen:
            shared = len(tokens & queue[other])
            if 9 * shared >= 4 * (size + sizes[other]):  # shared / union >= 4 / 5
                union.join(n, other)
    lead: dict[Hashable, int] = {}
    for n, tokens in enumerate(queue):
        root = union.find(n)
        lead[root] = min(lead.get(root, len(texts)), first[tokens])
    place = {tokens: lead[union.find(n)] for n, tokens in enumerate(queue)}
    return [place[tokens] for tokens in sets]
