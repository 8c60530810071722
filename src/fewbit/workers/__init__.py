"""Workers: where independent work is done, in this process or in tasks of Ray on this machine or on a cluster.

Both kinds map a pure function over items and give the same results. Ray distributes the tasks, and does a task again whose
worker or node was lost; without `--workers` and `--ray` it is neither needed nor imported.

local      what workers are (`Workers`), and this process (`LOCAL`)
cluster    tasks of Ray; `opened` gives the workers that the options ask for
machines   what each machine of a cluster has to have before any work is given to it
"""

from fewbit.workers.cluster import USERS, Cluster, check_workers, opened
from fewbit.workers.local import LOCAL, Local, Workers, in_order

__all__ = ["LOCAL", "USERS", "Cluster", "Local", "Workers", "check_workers", "in_order", "opened"]
