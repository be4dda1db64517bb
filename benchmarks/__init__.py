"""Workloads and systems side by side: what snncompile is worth against what one would use instead.

`python -m benchmarks --quick` from a checkout measures every system on every workload, each in a process of its own,
and prints a number only where the system computes what the step loop computes. The files are the parts of that
sentence: `networks` and `workloads` (what is run), `systems` (who runs it); `case` and `outcome` (what is right);
`worker`, `process`, `measure` and `runner` (how it is timed); `records`, `table` and `plots` (what comes out).
"""
