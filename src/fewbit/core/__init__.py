"""Core: the values that stages hand to each other, the arithmetic on them, and what keeps their memory small.

Values
    graph      the exported program with its ops and sites
    plan       for each site its grid, scale and codes, and who decided
    checks     how simulation and runtime differ, for each site and output
    task       the base of every task, and what tasks give
    inputs     what a model takes, and batches of it
    record     what a file says of its images
Arithmetic and limits
    grid       real numbers to codes and back
    bits       what `--bits` means
    duration   what `--time` means
    pixels     the fields of preprocessing: names and checks
    colours    numbers as colours
Graphs and machines
    fx         tools for editing graphs
    sent       a graph as plain values, for another process
    device     where values lie and graphs run
    call       one call at a time, in the state of torch that it needs
    shelf      what grows with the number of images, in a file
    pages      files as memory, and memory that is given back
    walk       the files below a folder, through links too
    limit      what `--memory` means, and what is held
    peak       the most memory that a process has held
"""
