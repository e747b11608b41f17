"""What a recorded run's routing looks like: a self-contained report, and the data and the page behind it.

``data`` turns routing logs into what the page draws, ``alerts`` says in sentences what is wrong, ``report`` writes one
HTML file; ``page/`` is the one module that draws, here and wherever else the same data are shown.
"""
