"""Files: canonical weights in safetensors, with a versioned plan (JSON) in the metadata.

``replacing`` puts a file in the place of another, ``plan`` is what a file says besides its tensors, ``reading`` an open file,
``agreement`` what it and a model have to have in common, ``saving`` and ``loading`` what users call. Nothing in a file is executed
or imported.
"""

from pycompress.storage.loading import load
from pycompress.storage.saving import save

__all__ = ["load", "save"]
