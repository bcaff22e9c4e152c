"""Atomic writes, checksums and locks for files and folders."""

from lorakit.storage.atomic import atomic_file, atomic_folder, delete_folder, remove_leftovers
from lorakit.storage.locking import HOLDER_NAME, LOCK_NAME, lock_folder
from lorakit.storage.outputs import (
    is_within,
    other_files,
    require_free_file,
    require_free_folder,
    require_replaceable,
    visible_names,
)
from lorakit.storage.quiet import is_quiet_asked, quiet
from lorakit.storage.records import (
    CHECKSUM,
    STRICT_JSON,
    StrictJsonError,
    finite,
    json_line,
    parse_json,
    read_json,
    read_record,
    require_checksum,
    sha256,
    write_json,
    write_record,
    write_rows,
)
from lorakit.storage.refusals import is_disk_full, reading, regular_file, writing
from lorakit.storage.replaced import read_unchanged
from lorakit.storage.yaml_files import dump_yaml, parse_yaml, read_yaml
