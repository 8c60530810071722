"""Data: where images come from, how they become the inputs of a model, and what their labels are.

images       images from anywhere as normalized batches with labels, in the model's class order
shares       which of them calibrate, choose and are scored
sources      names, labels and storage of those in a folder, parquet or NumPy file, before any is decoded
collection   a DataLoader, Dataset, list or generator of a Python program; items: what one of its items holds
labels       the class that a label says: a number, a name or a row of numbers
arrays       images as one array
floats       whether inputs of the model that are given as they are fit its mean and std
beside       what comes with an image for the other inputs of a model
constants    inputs that are the same for all images: from the command line, files or Python
decode       from an encoded image to pixels
bands        a picture as an array with as many bands as the model has channels
preprocess   how a picture becomes an input: the fields
prepare      the same done, in NumPy and Pillow alone; `predict.py` of a run has a copy
memory       decoded images that are kept
classes      names of classes in the order of the outputs
synthesize   images made from the model
"""
