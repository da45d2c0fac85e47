"""Small files in the formats of the public data sets, written by the tests."""

import io
import tarfile

from PIL import Image


def jpeg(level, width=5, height=4):
    """A JPEG of one grey level."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (level, level, level)).save(file, "JPEG", quality=95)
    return file.getvalue()


def tar(members, format=tarfile.PAX_FORMAT):
    """The bytes of a tar of {name: bytes}, or of such pairs where a name comes twice; None is a folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            archive.addfile(info, None if data is None else io.BytesIO(data))
    return file.getvalue()


def levels(source):
    """The grey level of each image, or of the first frame of each clip: which file answered."""
    return [int(source[i]["image"].reshape(-1)[0]) for i in range(len(source))]
