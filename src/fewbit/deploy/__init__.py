"""What a run ships: what its file says of itself, the folder with everything that a program needs, other formats, a server.

stamp    how the file was made and what was measured of it, in the file itself
"""

from fewbit.deploy.stamp import MADE, Stamp, made, read, stamp, stamped

__all__ = ["MADE", "Stamp", "made", "read", "stamp", "stamped"]
