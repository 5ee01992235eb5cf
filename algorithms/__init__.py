"""The objectives, one per file. Import them as ``rlzoo.algorithms``."""

if __name__ != "rlzoo.algorithms":
    raise ImportError("import rlzoo.algorithms, not algorithms: a second copy would register every name twice")
