from typing import Final

BUILD: Final[dict[str, str]]
MPI: Final[dict[str, str] | None]
