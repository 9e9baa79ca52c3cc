"""Pictures of a run, from the files that its stages left: the training curves, and the report page as a whole.

Imports no stage. page.py is the report top to bottom, inputs.py and vectors.py read, pictures.py and curves.py draw, style.py
is how it all looks.
"""
