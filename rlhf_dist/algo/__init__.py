"""Pure tensor maths: no process, no device, no file. Axes: B sequences, R response positions, V vocabulary entries."""
