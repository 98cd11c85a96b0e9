"""Learning at inference: chosen CMS levels go on learning from the stream that is read (Eq. 71, with its own clocks).

settings.py   which levels, at which rate, every how many tokens; the options of the command lines
learner.py    the weights that learn, their optimizer, and all that a state file must hold of them
"""
