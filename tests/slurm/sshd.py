"""A real sshd on loopback that lets the current user in with a key of its own, and nobody else."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import time
from pathlib import Path

from cluster import SYSTEM_PATH, free_port


class SshServer:
    """folder: for its keys and its log; environment: of the sessions"""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.port, self.user = folder, free_port(), getpass.getuser()
        self.identity = folder / "user_key"
        self.client_folder = folder / "bin"  # for PATH: an ssh that knows this host, whatever is in ~/.ssh
        self._environment = environment
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> SshServer:
        self.folder.mkdir(mode=0o700)
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-N", "", "-f", str(self.folder / name)], check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        options = {
            "ListenAddress": "127.0.0.1",
            "Port": self.port,
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "PasswordAuthentication": "no",
            "StrictModes": "no",  # the folder is below a world-writable one
            "PidFile": "none",
            "UsePAM": "no",
            "PermitRootLogin": "prohibit-password",
            "SetEnv": " ".join(f"{name}={value}" for name, value in self._environment.items()),
            "Subsystem": "sftp internal-sftp",
        }
        config = self.folder / "sshd_config"
        config.write_text("".join(f"{name} {value}\n" for name, value in options.items()))
        self._write_client()
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on its empty folder
        sshd = shutil.which("sshd", path=SYSTEM_PATH)
        assert sshd is not None
        with open(self.folder / "log", "wb") as log:
            self._process = subprocess.Popen([sshd, "-D", "-e", "-f", str(config)], stdout=log, stderr=log)
        self._wait()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()

    def _write_client(self) -> None:
        host_key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}")
        self.client_folder.mkdir()
        client = self.client_folder / "ssh"
        client.write_text(
            f'#!/bin/sh\nexec {shutil.which("ssh")} -o UserKnownHostsFile={self.folder}/known_hosts "$@"\n'
        )
        client.chmod(0o700)

    def _wait(self) -> None:
        deadline = time.monotonic() + 20
        while b"Server listening" not in (self.folder / "log").read_bytes():
            if time.monotonic() > deadline:
                raise RuntimeError((self.folder / "log").read_text())
            time.sleep(0.1)
