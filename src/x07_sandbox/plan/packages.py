"""Debian packages that bring well-known programs and Python modules, for hints to what an image lacks."""

from __future__ import annotations

from typing import Final

# Programs whose package has another name, and those that are so well known that a missing file of that name is one.
_PROGRAMS: Final = {
    "cargo": "cargo",
    "cc": "gcc",
    "cmake": "cmake",
    "convert": "imagemagick",
    "curl": "curl",
    "Rscript": "r-base-core",
    "ffmpeg": "ffmpeg",
    "fish": "fish",
    "g++": "g++",
    "gawk": "gawk",
    "gcc": "gcc",
    "git": "git",
    "go": "golang-go",
    "java": "default-jre-headless",
    "javac": "default-jdk-headless",
    "jq": "jq",
    "less": "less",
    "lua": "lua5.4",
    "lua5.4": "lua5.4",
    "make": "make",
    "node": "nodejs",
    "npm": "npm",
    "npx": "npm",
    "perl": "perl",
    "php": "php-cli",
    "pkg-config": "pkg-config",
    "psql": "postgresql-client",
    "pytest": "python3-pytest",
    "rg": "ripgrep",
    "ruby": "ruby",
    "rustc": "rustc",
    "sqlite3": "sqlite3",
    "ssh": "openssh-client",
    "tclsh": "tcl",
    "tsc": "node-typescript",
    "unzip": "unzip",
    "vim": "vim",
    "wget": "wget",
    "xz": "xz-utils",
    "zip": "zip",
    "zsh": "zsh",
}
PIP: Final = frozenset({"pip", "pip3"})
# Modules whose package is not python3-NAME.
_MODULES: Final = {
    "PIL": "python3-pil",
    "attr": "python3-attr",
    "bs4": "python3-bs4",
    "cv2": "python3-opencv",
    "dateutil": "python3-dateutil",
    "dns": "python3-dnspython",
    "pkg_resources": "python3-pkg-resources",
    "serial": "python3-serial",
    "skimage": "python3-skimage",
    "sklearn": "python3-sklearn",
    "tkinter": "python3-tk",
    "typing_extensions": "python3-typing-extensions",
    "yaml": "python3-yaml",
    "zmq": "python3-zmq",
}
# Modules whose package is python3-NAME.
_PLAIN_MODULES: Final = frozenset(
    {
        *("aiohttp", "babel", "click", "colorama", "cryptography", "django", "docutils", "fastapi", "flask", "h5py"),
        *("httpx", "hypothesis", "jinja2", "jsonschema", "lxml", "mako", "markdown", "markupsafe", "matplotlib"),
        *("mpmath", "msgpack", "networkx", "nltk", "numba", "numpy", "openpyxl", "packaging", "pandas", "pexpect"),
        *("pip", "psutil", "psycopg2", "pydantic", "pygments", "pymysql", "pyparsing", "pytest", "redis", "regex"),
        *("requests", "rich", "scipy", "seaborn", "setuptools", "simplejson", "six", "sqlalchemy", "statsmodels"),
        *("sympy", "tabulate", "toml", "tornado", "tqdm", "ujson", "urllib3", "websockets", "wheel", "xarray"),
    }
)


def is_known_program(name: str) -> bool:
    """Whether a missing file of this name is a program rather than a file of the user's."""
    return name in _PROGRAMS or name in PIP


def flag_for_program(name: str) -> str:
    """What `x07 image build` needs for a program; the package is left open where it is not known."""
    if name in PIP:
        return "--pip PACKAGE"
    return f"--include {_PROGRAMS.get(name, 'PACKAGE')}"


def flag_for_module(name: str) -> str:
    """What `x07 image build` needs for a Python module: Debian's package where it is known, else that of PyPI."""
    if name in PIP:
        return "--pip PACKAGE"
    if name in _PLAIN_MODULES:
        return f"--include python3-{name}"
    return f"--include {_MODULES[name]}" if name in _MODULES else f"--pip {name}"
