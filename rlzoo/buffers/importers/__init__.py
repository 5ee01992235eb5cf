"""The formats of other stacks' logs, one file each."""
