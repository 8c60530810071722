"""Images from the model itself, where there are no others or too few.

teacher    the float model as it was exported: its answers, what its batch norms read, what its attention gives
losses     what images are held to
generator  FDDA's class-conditional generator
fdda       images from batch-norm statistics, with a centre for each class where there are calibration images
inversion  images that are learned themselves: schedule, starts
norms      such images from batch-norm statistics alone
patches    such images from the variety of patches in attention, for models without batch norm
source     all of them as a source of images like any other
"""
