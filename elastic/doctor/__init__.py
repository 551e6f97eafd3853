"""Whether this machine can take part in a run, and what to set: `elastic doctor`.

`machine`, `calling` (a coordinator) and `visiting` (a second doctor, which is `hosting`) collect facts; `judging` makes
findings with advice of them, and touches nothing.
"""
