import subprocess
import sys

import pytest

from curation.ingest.suffix import is_public_suffix, registrable_domain

SUFFIXES = ["com", "uk", "co.uk", "x.ck", "c.kobe.jp", "github.io", "s3.amazonaws.com", "k12.ak.us", "公司.cn"]
NO_SUFFIXES = ["example.com", "test", "blocked.test", "www.ck", "city.kobe.jp", "a.github.io", "10.0.0.1", "::1"]


@pytest.mark.parametrize("name", SUFFIXES)
def test_public_suffixes(name):
    assert is_public_suffix(name)
    assert registrable_domain(name) == name
    assert registrable_domain(f"a.b.{name}") == f"b.{name}"


def test_a_top_level_domain_with_rules_for_names_below_it_only():
    assert is_public_suffix("ck")  # *.ck
    assert registrable_domain("a.b.c.ck") == "b.c.ck"


@pytest.mark.parametrize("name", NO_SUFFIXES)
def test_names_that_are_none(name):
    assert not is_public_suffix(name)


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("example.com", "example.com"),
        ("a.b.example.com", "example.com"),
        ("www.example.co.uk", "example.co.uk"),
        ("a.b.c.kobe.jp", "b.c.kobe.jp"),  # *.kobe.jp
        ("a.city.kobe.jp", "city.kobe.jp"),  # !city.kobe.jp
        ("www.www.ck", "www.ck"),
        ("one.github.io", "one.github.io"),  # the private section
        ("i.one.github.io", "one.github.io"),
        ("www.xn--85x722f.xn--55qx5d.cn", "xn--85x722f.xn--55qx5d.cn"),
        ("www.食狮.公司.cn", "食狮.公司.cn"),
        ("_a.user_name.github.io", "user_name.github.io"),
        ("h001.sample.test", "sample.test"),  # the list knows no test: its rule *
        ("www.example.com.", "example.com"),
        ("localhost", "localhost"),
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::1"),
        ("1.2.3.4.5", "4.5"),  # no IP address
        ("", ""),
    ],
)
def test_registrable_domains(host, domain):
    assert registrable_domain(host) == domain


def test_two_addresses_without_a_domain_are_not_of_one_owner():
    assert len({registrable_domain(host) for host in ("10.0.0.1", "10.1.0.1", "localhost", "github.io", "co.uk")}) == 5


def test_the_list_is_never_asked_for(tmp_path):
    """Neither import nor call looks up a name, opens a connection, or writes a file; refused, in a fresh process."""
    script = (
        "import os, sys\n"
        "def refuse(event, args):\n"
        "    written = event == 'open' and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR)\n"
        "    asks = event.startswith('socket.') and event not in ('socket.__new__', 'socket.bind')\n"
        "    if asks or written and '__pycache__' not in args[0]:\n"
        "        os.write(2, f'{event} {args}'.encode())\n"
        "        os._exit(3)\n"
        "sys.addaudithook(refuse)\n"
        "from curation.ingest.suffix import registrable_domain\n"
        "print(registrable_domain('www.example.co.uk'), registrable_domain('a.b.github.io'))\n"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "example.co.uk b.github.io\n"), done.stderr
    assert list(tmp_path.rglob("*")) == []
