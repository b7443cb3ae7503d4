"""One text out of many files, whose lines know where they come from."""

import re

import pytest

from cupyattn.cuda.making.source import join, sources


def write(folder, **texts):
    for name, text in texts.items():
        (folder / f"{name}.cuh").write_text(text)


def places(text):
    """{line: (file, number)} as a compiler that heeds #line counts them."""
    found, file, number = {}, None, 0
    for line in text.splitlines():
        if seam := re.fullmatch(r'#line (\d+) "(.+)"', line):
            number, file = int(seam[1]), seam[2]
            continue
        if line:
            found[line] = (file, number)
        number += 1
    return found


def test_a_file_without_includes_is_itself_with_its_name_above(tmp_path):
    write(tmp_path, a="int a;\n\nint b;\n")
    assert join("a.cuh", tmp_path) == '#line 1 "a.cuh"\nint a;\n\nint b;\n'


def test_an_include_stands_where_it_is_asked_for(tmp_path):
    write(tmp_path, a='before\n#include "b.cuh"\nafter\n', b="b\n")
    assert list(places(join("a.cuh", tmp_path))) == ["before", "b", "after"]


def test_a_header_that_two_others_include_comes_once_and_before_both(tmp_path):
    both = '#include "d.cuh"\n'
    write(tmp_path, a='#include "b.cuh"\n#include "c.cuh"\na\n', b=f"{both}b\n", c=f"{both}c\n", d="#pragma once\nd\n")
    text = join("a.cuh", tmp_path)
    assert list(places(text)) == ["d", "b", "c", "a"]
    assert text.splitlines().count("d") == 1


def test_every_line_keeps_its_file_and_number(tmp_path):
    texts = {
        "a": '// a\n#pragma once\na 3\n#include "b.cuh"\na 5\n#include "c.cuh"\n#include "b.cuh"\na 8\n\na 10\n',
        "b": '#pragma once\n\nb 3\n#include "c.cuh"\nb 5\n',
        "c": "c 1\n  # pragma once\nc 3",
    }
    write(tmp_path, **texts)
    expected = {
        line: (f"{name}.cuh", number)
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if line and "#" not in line
    }
    assert places(join("a.cuh", tmp_path)) == expected


@pytest.mark.parametrize("include", ['  #  include  "b.cuh"', '#include"b.cuh"', '#include "b.cuh"  // why'])
def test_an_include_may_be_spaced_and_commented(tmp_path, include):
    write(tmp_path, a=f"{include}\n", b="b\n")
    assert list(places(join("a.cuh", tmp_path))) == ["b"]


def test_an_include_in_a_comment_is_none(tmp_path):
    write(tmp_path, a='// #include "b.cuh"\n')
    assert '// #include "b.cuh"' in join("a.cuh", tmp_path)


@pytest.mark.parametrize("include", ["#include <cuda_fp16.h>", "# include<cstdint>", "#include HEADER"])
def test_other_headers_are_refused_with_file_and_line(tmp_path, include):
    write(tmp_path, a='#include "b.cuh"\n', b=f"b\n{include}\n")
    with pytest.raises(ValueError, match=re.escape("b.cuh, line 2: only headers of this folder")):
        join("a.cuh", tmp_path)


@pytest.mark.parametrize(("last", "detour"), [("a", "a.cuh -> b.cuh -> c.cuh -> a.cuh"), ("c", "c.cuh -> c.cuh")])
def test_a_file_that_includes_itself_is_refused_with_the_detour(tmp_path, last, detour):
    write(tmp_path, a='#include "b.cuh"\n', b='#include "c.cuh"\n', c=f'#include "{last}.cuh"\n')
    with pytest.raises(ValueError, match=f"includes itself: {detour}$"):
        join("a.cuh", tmp_path)


def test_a_missing_header_is_named_with_who_asked(tmp_path):
    write(tmp_path, a='#include "b.cuh"\n', b='#include "nowhere.cuh"\n')
    with pytest.raises(FileNotFoundError, match=r"no CUDA source nowhere\.cuh in .*, which b\.cuh includes"):
        join("a.cuh", tmp_path)


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no CUDA source a\.cu in .*"):
        join("a.cu", tmp_path)


def test_sources_are_the_cuda_files_of_a_folder(tmp_path):
    for name in ("b.cuh", "a.cu", "notes.md", "c.py"):
        (tmp_path / name).touch()
    assert sources(tmp_path) == ("a.cu", "b.cuh")


@pytest.mark.parametrize("name", sources())
def test_every_file_of_the_package_can_be_joined(name):
    text = join(name)
    assert re.search(r"^\s*#\s*(include|pragma\s+once)", text, re.MULTILINE) is None
