"""Teachers: models that answer what is asked about a picture and say, token by token, what else they would have said.

`protocol` is the role, `vision_language` and `hugging_face` play it, `flow` is the work they share, `targets` the
arithmetic, `load` opens one from its directory. Knows nothing of Ray, files of signals, or students.
"""
