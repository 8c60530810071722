"""What a run ships: what its file says of itself, the folder with everything that a program needs, other formats, a server.

stamp    how the file was made and what was measured of it, in the file itself
folder   deploy/: a program with what it reads, and examples
program  predict.py, put together from its pieces
python   the pieces
export   the folder with the model, in the form of a runtime
serve    a page and a JSON endpoint for both models of a run
compared how far their answers are apart
"""

from fewbit.deploy.stamp import MADE, Stamp, as_stored, made, read, stamp, stamped, times

__all__ = ["MADE", "Stamp", "as_stored", "made", "read", "stamp", "stamped", "times"]
