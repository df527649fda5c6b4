"""Debian packages of well-known programs and Python modules, for hints on what an image lacks."""

from typing import Final

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


def is_known_program(name: str) -> bool:
    """Return whether a missing file of this name is a program rather than a user's file."""
    return name in _PROGRAMS or name in _PIP


def flag_for_program(name: str) -> str:
    """Return the `x07 image build` flag for a program, with a placeholder for an unknown package."""
    return "--pip PACKAGE" if name in _PIP else f"--include {_PROGRAMS.get(name, 'PACKAGE')}"


def flag_for_module(name: str) -> str:
    """Return the `x07 image build` flag for a Python module: Debian's package if known, else PyPI's."""
    if name in _PIP:
        return "--pip PACKAGE"
    if name in _MODULES or name in _PLAIN_MODULES:
        return f"--include python3-{_MODULES.get(name, name.lower().replace('_', '-'))}"
    return f"--pip {name}"
