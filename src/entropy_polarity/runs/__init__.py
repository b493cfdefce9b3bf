"""A run: its recipe, the folder it is kept in, its checkpoints, and going on with it.

recipe        settings in TOML                        checkpoints   which are ours, which are whole, which go
layout        what a run folder holds                 method_state  the state of a method in a checkpoint
record        written and read                        consent       what the folder of somebody else may name
resuming      from which checkpoint, with which lines of the record
"""
