"""Bad inputs at every door of fewbit, each with what is right. `make doors` tries them all.

A case (case.py) is what is typed, what was put in its folder before, and what is right. The cases of a kind stand in one file
of kinds/. Each runs in a process of its own, forked from one that has imported everything (serve.py), in a folder of its own
(place.py), and one judge (judge.py) looks at how it ended: the exit code, the one message, and everything that was left behind.
"""
