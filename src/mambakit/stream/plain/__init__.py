"""What runs with NumPy alone: features, normaliser, and one step of each model.

`mambakit stream pack` copies these files into a submission as they are, so nothing here may import anything else.
"""
