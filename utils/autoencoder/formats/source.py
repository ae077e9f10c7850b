"""Where autoencoders of other tools lie: a folder, or a repository of the hub."""

import contextlib
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import huggingface_hub
import numpy as np
from safetensors import SafetensorError

from utils.artifacts import read_json
from utils.settings import FULL, InputError, Json, disk_error, hub_token, require

if TYPE_CHECKING:  # it takes seconds, which a training on another framework does not need
    import torch

N_LISTED = 8  # files that an error lists
Tensors = dict[str, "torch.Tensor"]


class Source:
    """The files of a folder, or of a repository of the hub, which are fetched when they are read.

    Attributes:
        name: As the user gave it.
        revision: The commit of a repository; None of a folder.
        files: Paths within it, with ``/``, sorted.

    Raises:
        InputError: There is neither such a folder nor, as far as can be seen, such a repository.
    """

    def __init__(self, name: str):
        self.name, self.revision = name, None
        self.folder: Path | None = Path(name).expanduser()
        require(
            not self.folder.is_file(),
            f"IMPORT_FROM must be a folder or a repository of the hub; {name} is a file. Name the "
            "folder that it is in.",
        )
        if not self.folder.is_dir():
            self._find_repository()
        if self.folder is not None:
            paths = (path for path in self.folder.rglob("*") if path.is_file())
            self.files = sorted(path.relative_to(self.folder).as_posix() for path in paths)

    def _find_repository(self) -> None:
        """List a repository, of which nothing is fetched yet; offline, what was fetched before."""
        # Imported here: it takes seconds that others do not need, and crashes behind TensorFlow.
        from utils.language_model import look_for_hub

        look_for_hub()
        with _hub_read(self.name):
            if huggingface_hub.constants.HF_HUB_OFFLINE:
                fetched = huggingface_hub.snapshot_download(self.name, local_files_only=True)
                self.folder = Path(fetched)
                self.revision = self.folder.name
                return
            hub = huggingface_hub.HfApi(token=hub_token())
            # The client keeps which commit this is, for a time without a network.
            self.revision = hub.resolve_revision(self.name).resolved
            info = hub.model_info(self.name, revision=self.revision)
        self.folder = None
        self.files = sorted(file.rfilename for file in info.siblings)

    def path(self, file: str) -> Path:
        """A file on this machine, fetched first if need be."""
        if self.folder is not None:
            return self.folder / file
        with _hub_read(self.name):
            fetched = huggingface_hub.hf_hub_download(
                self.name, file, revision=self.revision, token=hub_token()
            )
        return Path(fetched)

    def json(self, file: str) -> dict[str, Json]:
        """The content of a JSON file, which must be an object."""
        content = read_json(self.path(file), f"Get it from {self.name} anew.")
        require(isinstance(content, dict), f"{file} of {self.name} must hold a JSON object.")
        return content

    def tensors(self, file: str) -> Tensors:
        """The tensors of a ``.safetensors`` file or, without running any code in it, a pickle.

        Dtypes are as stored. What can stay on the disk is not read before it is used.

        Raises:
            InputError: It is damaged, or holds something else than tensors by name.
        """
        import torch
        from safetensors.torch import load_file

        path = self.path(file)
        if path.suffix == ".safetensors":
            try:
                return load_file(path)
            except SafetensorError as error:
                raise InputError(
                    f"{file} of {self.name} is damaged ({error}). Get it anew."
                ) from error
        try:
            lazily = zipfile.is_zipfile(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=lazily)
        except Exception as error:  # of classes of pickle's, which must not be imported here
            code = re.search(r"GLOBAL (\S+)", str(error))
            fault = f"asks for Python code, {code[1]}, which is not run" if code else "is damaged"
            raise InputError(
                f"{file} of {self.name} must hold tensors and nothing else; it {fault}. Get it "
                "anew, or have it converted to .safetensors where it was made."
            ) from None
        require(
            isinstance(content, dict)
            and all(isinstance(values, torch.Tensor) for values in content.values()),
            f"{file} of {self.name} must hold tensors by name; it holds other things too. Convert "
            "it where it was made.",
        )
        return content

    def listed(self) -> str:
        """A few of its files, in words."""
        more = len(self.files) - N_LISTED
        names = ", ".join(self.files[:N_LISTED]) or "no file"
        return f"{names} and {more} more" if more > 0 else names


@contextlib.contextmanager
def _hub_read(name: str) -> Iterator[None]:
    """Turn what the hub's client raises into an `InputError`; a full disk goes up as it is."""
    try:
        yield
    except huggingface_hub.errors.HFValidationError:
        raise InputError(
            f"IMPORT_FROM must be a folder or a repository of the hub, as owner/name; there is no "
            f"folder {name!r}, and a repository cannot have that name."
        ) from None
    except Exception as error:  # of whichever HTTP library the hub's client is made with
        if (refusal := disk_error(error)) is not None and refusal.errno in FULL:
            raise
        from utils.language_model import hub_error

        # "from None", because the errors behind this one may show request headers.
        raise InputError(hub_error(name, error)) from None


def entry(content: dict[str, Json], file: str, *path: str) -> Json:
    """An entry of a JSON file's ``content``, by its path of names.

    Raises:
        InputError: There is none.
    """
    for name in path:
        require(
            isinstance(content, dict) and name in content,
            f"{file} must say {'.'.join(path)}; it does not. Get the file that belongs to the "
            "weights.",
        )
        content = content[name]
    return content


def matrix_shape(tensors: Tensors, name: str, file: str) -> tuple[int, int]:
    """Rows and columns of a matrix; raises `InputError` if there is none of that name."""
    shape = tuple(tensors[name].shape) if name in tensors else ()
    require(
        len(shape) == 2,
        f"{file} must hold a matrix {name}; it holds "
        f"{', '.join(f'{one} {tuple(values.shape)}' for one, values in tensors.items())}.",
    )
    return shape


def dtype_of(tensors: Tensors) -> str:
    """The dtype of stored weights, or their dtypes, as ``"float32"``."""
    dtypes = {values.dtype for values in tensors.values() if values.is_floating_point()}
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def arrays(
    tensors: Tensors, shapes: dict[str, tuple[int, ...]], file: str
) -> dict[str, np.ndarray]:
    """Exactly the tensors of ``shapes``, as float32 arrays.

    Raises:
        InputError: One is missing, is of another shape or not finite, or there are others.
    """
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is not of this format" for name in tensors if name not in shapes]
    for name in shapes:
        if name not in tensors:
            continue
        if tuple(tensors[name].shape) != shapes[name]:
            wrong.append(f"{name} is {tuple(tensors[name].shape)}, not {shapes[name]}")
        elif not bool(tensors[name].isfinite().all()):
            wrong.append(f"{name} holds NaN or infinity")
    require(not wrong, f"{file} does not hold the weights that its format has: {'; '.join(wrong)}.")
    return {name: tensors[name].float().numpy() for name in shapes}


def folders_with(source: Source, *names: str) -> list[str]:
    """The folders of a source that hold a file of each name; ``"."`` is the source itself."""
    files = set(source.files)
    folders = sorted({str(PurePosixPath(file).parent) for file in files})
    return [folder for folder in folders if files.issuperset(inside(folder, n) for n in names)]


def inside(folder: str, name: str) -> str:
    """The path of a file in a folder of `folders_with`."""
    return name if folder == "." else f"{folder}/{name}"


def count(config: dict[str, Json], name: str, file: str) -> int:
    """A positive whole number of a configuration; raises `InputError` if it is none."""
    value = config.get(name)
    is_count = type(value) in (int, float) and value >= 1 and float(value).is_integer()
    require(is_count, f"{name} in {file} must be a positive whole number; it is {value!r}.")
    return int(value)
