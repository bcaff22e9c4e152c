"""Files that are whole or absent, checksums, locks, and errors that name the path."""

from lorakit.storage.atomic import (
    LOCK_NAME,
    atomic_file,
    atomic_folder,
    delete_folder,
    lock_folder,
    remove_leftovers,
)
from lorakit.storage.paths import (
    is_disk_full,
    is_within,
    other_files,
    reading,
    regular_file,
    require_free_file,
    require_free_folder,
    require_replaceable,
    visible_names,
    writing,
)
from lorakit.storage.records import (
    CHECKSUM,
    STRICT_JSON,
    StrictJsonError,
    finite,
    json_line,
    read_json,
    read_record,
    require_checksum,
    sha256,
    write_json,
    write_record,
    write_rows,
)
from lorakit.storage.yaml_files import dump_yaml, parse_yaml, read_yaml
