"""GPT-2's words of a large text, found all at once, and their ids, remembered from the last time.

Most of the time that byte-level BPE takes goes into cutting a text into words and into words that have been met
before. Here numpy cuts, as GPT-2's pattern does, and a table knows the ids of the words met so far. What lies
around bytes that are no ASCII is left to the tokenizer itself, and so is each new word.
"""

import numpy as np

LETTER, DIGIT, OTHER, SPACE, WHITE, FOREIGN = range(6)  # what a byte is to the pattern; the first three are visible
CLASSES = np.full(256, OTHER, dtype=np.uint8)
CLASSES[[*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1)]] = LETTER
CLASSES[ord("0") : ord("9") + 1] = DIGIT
CLASSES[ord(" ")] = SPACE
CLASSES[[ord(c) for c in "\t\n\v\f\r"]] = WHITE
CLASSES[128:] = FOREIGN

LONGEST = 16  # bytes of a word that the table can know
BITS = 18  # of the table's size
ENTRIES = 150_000  # words that are remembered
SHORT = 1500  # characters of a text that is not worth the trouble
MUCH_FOREIGN, MUCH_NEW = 0.02, 0.2  # of the bytes, of the words: with more, the tokenizer itself is faster
MASKS = np.array([2 ** (8 * n) - 1 for n in range(9)], dtype=np.uint64)  # of a key with n bytes
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], dtype=np.uint64)


class Words:
    """The ids of a text, by `encode(text)`, which knows them slowly, and by memory."""

    def __init__(self, encode, entries=ENTRIES, bits=BITS):
        self.slow, self.entries, self.bits = encode, entries, bits
        self.known = {}  # bytes of a word: (its first place in the pool, how many ids)
        self.pool = np.zeros(0, dtype=np.uint32)
        self.keys = np.zeros((2, 1 << bits), dtype=np.uint64)  # the bytes of the word in each slot
        self.place = np.zeros(1 << bits, dtype=np.int64)
        self.count = np.zeros(1 << bits, dtype=np.int64)

    def encode(self, text):
        """The ids of `text`, uint32; the same that the slow way finds."""
        if len(text) < SHORT:
            return np.array(self.slow(text), dtype=np.uint32)
        data = text.encode("utf-8")
        kind = CLASSES.take(np.frombuffer(data, dtype=np.uint8))
        foreign = np.count_nonzero(kind == FOREIGN)
        if foreign > MUCH_FOREIGN * len(data) or b"\0" in data:  # zeros fill up the keys of short words
            return np.array(self.slow(text), dtype=np.uint32)
        starts = cut(data, kind) if not foreign else cut_foreign(data, kind)
        lengths = np.diff(starts, append=len(data))
        first, second = keys_of(data, starts, lengths)
        slots, found = self.look_up(first, second)
        found &= lengths <= LONGEST
        unknown = np.flatnonzero(~found)
        if len(unknown) > MUCH_NEW * len(starts):
            ids = np.array(self.slow(text), dtype=np.uint32)
            _, at, times = np.unique(first[unknown] ^ (second[unknown] * MIX[0]), return_index=True, return_counts=True)
            unknown = unknown[at[times > 1]]  # those that may come again
            self.learn(data, starts, lengths, first, second, unknown, [])
            return ids
        once = []  # the ids of words that are not remembered
        entries = self.learn(data, starts, lengths, first, second, unknown, once)
        place, count = self.place[slots], self.count[slots]
        if len(unknown):
            place[unknown], count[unknown] = np.array(entries).T
        pool = np.concatenate([self.pool, np.array(once, dtype=np.uint32)]) if once else self.pool
        place = np.where(place < 0, len(self.pool) - 1 - place, place)
        ends = np.cumsum(count)
        return pool[np.arange(ends[-1]) + np.repeat(place - (ends - count), count)]

    def look_up(self, first, second):
        """(the slot of each word in the table, whether it is there)."""
        slots, others = slots_of(first, second, self.bits)
        found = (self.keys[0][slots] == first) & (self.keys[1][slots] == second)
        missing = np.flatnonzero(~found)
        other = others[missing]
        elsewhere = (self.keys[0][other] == first[missing]) & (self.keys[1][other] == second[missing])
        slots[missing[elsewhere]] = other[elsewhere]
        found[missing] = elsewhere
        return slots, found

    def learn(self, data, starts, lengths, first, second, which, once):
        """(place in the pool, number of ids) of the words numbered `which`, remembered as far as there is room.

        Where there is none, the ids go to the list `once`, and their place is -1 minus that in the list.
        """
        entries, new, ids, known = [], [], [], self.known
        begins, sizes = starts[which].tolist(), lengths[which].tolist()
        for i, begin, size in zip(which.tolist(), begins, sizes, strict=True):
            word = data[begin : begin + size]
            entry = known.get(word)
            if entry is None:
                found = self.slow(word.decode("utf-8"))
                if len(known) < self.entries and size <= 4 * LONGEST:
                    entry = known[word] = (len(self.pool) + len(ids), len(found))
                    ids += found
                    new.append((i, *entry))
                else:
                    entry = (-1 - len(once), len(found))
                    once += found
            entries.append(entry)
        if new:
            self.pool = np.concatenate([self.pool, np.array(ids, dtype=np.uint32)])
            which, place, count = np.array(new).T
            short = lengths[which] <= LONGEST
            self.fill(first[which[short]], second[which[short]], place[short], count[short])
        return entries

    def fill(self, first, second, place, count):
        """Put words into the table where one of their two slots is free; the others are known all the same."""
        for way in (0, 1):
            slots = slots_of(first, second, self.bits)[way]
            free = self.keys[0][slots] == 0
            slots = slots[free]
            self.keys[0][slots], self.keys[1][slots] = first[free], second[free]
            self.place[slots], self.count[slots] = place[free], count[free]
            first, second, place, count = (a[~free] for a in (first, second, place, count))


def keys_of(data, starts, lengths):
    """The first 16 bytes of each word, as two numbers."""
    eight = np.ndarray((len(data) + 8,), "<u8", data + bytes(16), strides=(1,))  # the eight bytes from each on
    first = eight[starts] & MASKS[np.minimum(lengths, 8)]
    return first, eight[starts + 8 * (lengths > 8)] & MASKS[np.clip(lengths - 8, 0, 8)]


def slots_of(first, second, bits):
    """The two slots of the table, of 2**bits, in which a word may be, for arrays of its key's halves."""
    mixed = (first ^ (second * MIX[1])) * MIX[0]
    mixed ^= mixed >> np.uint64(32)
    shift = np.uint64(64 - bits)
    return ((mixed * MIX[0]) >> shift).astype(np.int64), ((mixed * MIX[2]) >> shift).astype(np.int64)


def cut(data, kind):
    """Where each word of the bytes begins; `kind` are their classes."""
    before = np.concatenate([kind[:1] * 0 + WHITE, kind[:-1]])
    white = (kind == SPACE) | (kind == WHITE)
    # letters, digits or others begin a word, unless a space does that for them
    starts = (kind <= OTHER) & (kind != before) & (before != SPACE)
    starts[0] = True
    contractions(np.frombuffer(data, dtype=np.uint8), starts)
    # white space is a word, but for its last character before a word: that one is alone, or a space and the word's
    changes = white[1:] != white[:-1]
    starts[1:] |= changes & white[1:]
    starts[:-1] |= changes & white[:-1]
    return np.flatnonzero(starts)


def contractions(text, starts):
    """Correct `starts` where an apostrophe begins a word: 's 't 'm 'd 're 've 'll are words of their own."""
    begin = np.flatnonzero(starts & (text == ord("'")))
    after = np.concatenate([text, np.zeros(2, np.uint8)])
    one, two = after[begin + 1], after[begin + 2]
    short = (one == ord("s")) | (one == ord("t")) | (one == ord("m")) | (one == ord("d"))
    long = ((one == ord("r")) | (one == ord("v"))) & (two == ord("e")) | (one == ord("l")) & (two == ord("l"))
    starts[begin[short | long] + 1] = False
    ends = np.concatenate([begin[short] + 2, begin[long] + 3])
    starts[ends[ends < len(text)]] = True


def cut_foreign(data, kind):
    """The same where some bytes are no ASCII: all around them, from one certain end of a word to the next, is one."""
    starts = cut(data, kind)
    white = (kind == SPACE) | (kind == WHITE)
    certain = np.flatnonzero(white[1:] & (kind[:-1] <= OTHER)) + 1  # after something visible, as in last_word
    certain = np.concatenate([[0], certain, [len(kind)]])
    has = np.add.reduceat(kind == FOREIGN, certain[:-1], dtype=np.int64) > 0
    starts = starts[~np.repeat(has, np.diff(certain))[starts]]
    begins = certain[:-1][has & ~np.concatenate([[False], has[:-1]])]
    return np.sort(np.concatenate([starts, begins]))
