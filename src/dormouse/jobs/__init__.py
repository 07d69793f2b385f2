"""Transparent mode: any process tree as a job that can be captured and restored (docs/processes.md).

dormouse run         keeper.py: owns the cell, forwards the streams, listens for requests
dormouse checkpoint  control.py: asks the keeper; or foreign.py: a tree that no keeper owns
dormouse restore     keeper.py again, with replicas from a snapshot

replica.py    one running copy: start, capture, restore          survey.py    what a tree has open, refusals
record.py     what a snapshot knows of its job                   private_files.py   the cell's tmpfs in a snapshot
hook_calls.py the program's own hooks                            explain.py   CRIU's words in ours
"""
