"""Task: what a model's outputs mean, and so how far apart two models are. The base of all is `Task` in core/task.py.

task       which task a model has; a new one is a file beside these and a line in tasks.py
classify   a class for an image
detect     objects: boxes, classes, scores
decode     from the outputs of a detector to boxes; selection: which of these it found
distance   how far the boxes of two models are apart, as a loss
objects    objects as people write them down: YOLO, Pascal VOC, parquet; coco: COCO; rows: what one of them may be
precision  average precision, as COCO measures it
segment    a class for each pixel
depth      a depth for each pixel
restore    a picture for a picture
maps       outputs and files with a number for each pixel
embed      an embedding for an image
tensors    outputs whose meaning is not known, compared as numbers
own        a task of a user, each of whose methods is looked at when it is called
closeness  how near one output is to another: correlation, relative error, equal elements
telling    measures that could have become worse; one that could not is replaced, and the report says why
interval   95 % intervals of shares, of differences, and by bootstrap over images
folder     files that belong to images: masks, depth maps, targets
names      which file or entry is an image's
paint      predictions on pictures
"""

from fewbit.core.task import Meter, OutputScore, Placement, Rating, Signature, Task
from fewbit.task.classify import Classify
from fewbit.task.closeness import Closeness
from fewbit.task.depth import Depth
from fewbit.task.detect import Detect
from fewbit.task.embed import Embed
from fewbit.task.restore import Restore
from fewbit.task.segment import Segment
from fewbit.task.task import check_name, recognise, task_named, task_of
from fewbit.task.tensors import Tensors

__all__ = [
    "Classify",
    "Closeness",
    "Depth",
    "Detect",
    "Embed",
    "Meter",
    "OutputScore",
    "Placement",
    "Rating",
    "Restore",
    "Segment",
    "Signature",
    "Task",
    "Tensors",
    "check_name",
    "recognise",
    "task_named",
    "task_of",
]
