"""`rlzoo serve`: the pages of a running or finished run, for a browser on the same machine.

Everything is read from the files of the run, without torch: looking on must not disturb training.
"""
