"""The rewards, one a file. Import them as ``rlzoo.rewards``."""

if __name__ != "rlzoo.rewards":
    raise ImportError("import rlzoo.rewards, not rewards: a second copy would register every name twice")
