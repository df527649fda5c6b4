"""Debian packages of well-known programs and Python modules, and the command that adds them to an image."""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from x07_sandbox.policy.denials import HowToAllow

# Well-known programs: a missing file of such a name means the program. Packages have the same names.
_SAME_NAME: Final = (
    *("cargo", "cmake", "curl", "ffmpeg", "fish", "g++", "gawk", "gcc", "git", "jq", "less", "lua5.4", "make", "npm"),
    *("perl", "ruby", "rustc", "sqlite3", "unzip", "vim", "wget", "zip", "zsh"),
)
_PROGRAMS: Final = dict(zip(_SAME_NAME, _SAME_NAME, strict=True)) | {
    "Rscript": "r-base-core",
    "cc": "gcc",
    "convert": "imagemagick",
    "go": "golang-go",
    "java": "default-jre-headless",
    "javac": "default-jdk-headless",
    "lua": "lua5.4",
    "node": "nodejs",
    "npx": "npm",
    "php": "php-cli",
    "pkg-config": "pkg-config",
    "psql": "postgresql-client",
    "pytest": "python3-pytest",
    "rg": "ripgrep",
    "ssh": "openssh-client",
    "tclsh": "tcl",
    "tsc": "node-typescript",
    "xz": "xz-utils",
}
_PIP: Final = frozenset({"pip", "pip3"})
# Modules whose package has another name than python3-NAME.
_MODULES: Final = {"cv2": "opencv", "dns": "dnspython", "tkinter": "tk"}
# Modules whose package is python3-NAME, in lower case and with '-' for '_'.
_PLAIN_MODULES: Final = frozenset(
    {
        *("PIL", "aiohttp", "attr", "babel", "bs4", "click", "colorama", "cryptography", "dateutil", "django"),
        *("docutils", "fastapi", "flask", "h5py", "httpx", "hypothesis", "jinja2", "jsonschema", "lxml", "mako"),
        *("markdown", "markupsafe", "matplotlib", "mpmath", "msgpack", "networkx", "nltk", "numba", "numpy"),
        *("openpyxl", "packaging", "pandas", "pexpect", "pkg_resources", "psutil", "psycopg2", "pydantic", "pygments"),
        *("pymysql", "pyparsing", "pytest", "redis", "regex", "requests", "rich", "scipy", "seaborn", "serial"),
        *("setuptools", "simplejson", "six", "skimage", "sklearn", "sqlalchemy", "statsmodels", "sympy", "tabulate"),
        *("toml", "tornado", "tqdm", "typing_extensions", "ujson", "urllib3", "websockets", "wheel", "xarray"),
        *("yaml", "zmq"),
    }
)

_IMAGE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class Adding(NamedTuple):
    """A command that adds something, and a flag for the next run; "" if that needs none."""

    command: str
    next_flag: str = ""

    @property
    def text(self) -> str:
        """Both in one phrase."""
        return f"{self.next_flag}, after {self.command}" if self.next_flag else self.command

    @property
    def how(self) -> HowToAllow:
        """Both as advice."""
        next_flag = self.next_flag or None
        return HowToAllow(json_path=None, value=None, flag=self.text, command=self.command, next_flag=next_flag)


class ImageInUse(NamedTuple):
    """The image of a run, to which a package may be added. name: as the user wrote it. Lists: see images/manifest."""

    name: str = "default"
    include: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()
    on_host: bool = False  # the backend uses the host's programs instead of an image

    def adding(self, flag: str, packages: Sequence[str]) -> Adding:
        """Return what adds *packages*: a command and, for an image without a name, a flag for the next run."""
        if self.on_host:
            return Adding(f"{'apt-get' if flag == '--include' else 'pip'} install {' '.join(packages)}")
        lists = {"--include": self.include, "--pip": self.pip, "--preload": self.preload}
        lists[flag] = (*lists[flag], *packages)
        if _IMAGE_NAME.fullmatch(self.name):  # the image keeps the lists that are not given
            return Adding(f"x07 image build --name {self.name} {flag} {','.join(lists[flag])}")
        words = " ".join(f"{name} {','.join(values)}" for name, values in lists.items() if values)
        return Adding(f"x07 image build --name mine {words}", "--image mine")


DEFAULT_IMAGE: Final = ImageInUse()


def is_known_program(name: str) -> bool:
    """Return whether a missing file of this name is a program rather than a user's file."""
    return name in _PROGRAMS or name in _PIP


def package_of_program(name: str) -> tuple[str, str]:
    """Return the `x07 image build` flag and the package for a program, or a placeholder for an unknown package."""
    return ("--pip", "PACKAGE") if name in _PIP else ("--include", _PROGRAMS.get(name, "PACKAGE"))


def package_of_module(name: str) -> tuple[str, str]:
    """Return the `x07 image build` flag and the package for a Python module, or a placeholder for an unknown package.

    A PyPI package of the module's name may be anybody's, and the name comes from the program's output.
    """
    if name in _MODULES or name in _PLAIN_MODULES:
        return "--include", f"python3-{_MODULES.get(name, name.lower().replace('_', '-'))}"
    return "--pip", "PACKAGE"
