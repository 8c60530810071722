"""Task: what a model's outputs mean, and so how far apart two models are.

task       what a task answers for, and which one a model has; a new task is a file beside these and a line there
classify   a class for an image
tensors    outputs whose meaning is not known, compared as numbers
closeness  how near one output is to another: correlation, relative error, equal elements
"""

from fewbit.task.classify import Classify
from fewbit.task.closeness import Closeness, OutputScore
from fewbit.task.task import Rating, Task, recognise
from fewbit.task.tensors import Tensors

__all__ = ["Classify", "Closeness", "OutputScore", "Rating", "Task", "Tensors", "recognise"]
