"""A real SLURM of three nodes on this machine, each with a network namespace, address and host name. Needs root."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "iproute2")
NODES = ("n1", "n2", "n3")

CONF = """
ClusterName=slmtest
SlurmctldHost=slmctl(10.231.7.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmctldPort=16817
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool/%n
SlurmctldPidFile={at}/run/slurmctld.pid
SlurmdPidFile={at}/run/slurmd-%n.pid
SlurmctldLogFile={at}/log/slurmctld.log
SlurmdLogFile={at}/log/slurmd-%n.log
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=5
KillWait=60
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname=n1 NodeAddr=10.231.7.11 Port=16818 CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname=n2 NodeAddr=10.231.7.12 Port=16818 CPUs=2 RealMemory=4000
NodeName=n3 NodeHostname=n3 NodeAddr=10.231.7.13 Port=16818 CPUs=2 RealMemory=4000
PartitionName=low Nodes=n1,n2,n3 Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=120
PartitionName=high Nodes=n1,n2,n3 MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def install() -> None:
    """With apt-get, where SLURM is missing."""
    if not all(shutil.which(name) for name in ("slurmctld", "slurmd", "sbatch", "munged", "ip")):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            subprocess.run(["apt-get", "-q", *words], env=env, check=True, capture_output=True)


@dataclass
class Cluster:
    """Started by `start`; `stop` ends all of it."""

    at: Path
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.at / "slurm.conf")}

    def start(self) -> None:
        self.stop()  # what tests that were killed have left in the nodes' namespaces
        at = self.at
        for name in ("munge", "state", "log", "run", "spool"):
            (at / name).mkdir(parents=True)
        (at / "munge").chmod(0o711)
        (at / "munge" / "key").write_bytes(os.urandom(1024))
        (at / "munge" / "key").chmod(0o400)
        (at / "slurm.conf").write_text(CONF.format(at=at))
        hosts = ["127.0.0.1 localhost", "10.231.7.1 slmctl", *(f"10.231.7.1{n[1]} {n}" for n in NODES)]
        (at / "hosts").write_text("\n".join(hosts) + "\n")
        self._network()
        munge = {name: f"--{name}-file={at}/munge/{name}" for name in ("key", "pid", "log", "seed")}
        self._daemon(
            "munged", f"exec munged --foreground --force --socket={at}/munge/socket {' '.join(munge.values())}"
        )
        self.wait(lambda: (at / "munge" / "socket").exists())
        named = f"hostname slmctl; mount --bind {at}/hosts /etc/hosts"
        self._daemon("slurmctld", f"exec unshare -u -m sh -c '{named}; exec slurmctld -D -f {at}/slurm.conf'")
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.ask("sinfo", "-h", "-o", "%T %D").split() == ["idle", "3"])

    def start_node(self, node: str) -> None:
        named = f"hostname {node}; mount --bind {self.at}/hosts /etc/hosts"
        inside = f"{named}; exec slurmd -D -f {self.at}/slurm.conf"
        # Not `ip netns exec`: it hides /sys/fs/cgroup, without which slurmd ends.
        self._daemon(node, f"exec nsenter --net=/run/netns/slm-{node} unshare -u -m sh -c '{inside}'")

    def _daemon(self, name: str, command: str) -> None:
        with (self.at / "log" / f"{name}.out").open("ab") as out:
            # They die with the tests, also when these are killed.
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "sh", "-c", command],
                env=self.env,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def _network(self) -> None:
        ip = ["link add slmbr0 type bridge", "addr add 10.231.7.1/24 dev slmbr0", "link set slmbr0 up"]
        for node in NODES:
            ip += [f"netns add slm-{node}", f"link add slm-v{node} type veth peer name eth0 netns slm-{node}"]
            ip += [f"link set slm-v{node} master slmbr0 up", f"-n slm-{node} addr add 10.231.7.1{node[1]}/24 dev eth0"]
            ip += [f"-n slm-{node} link set eth0 up", f"-n slm-{node} link set lo up"]
        for words in ip:
            subprocess.run(["ip", *words.split()], check=True, capture_output=True)

    def _remove_network(self) -> None:
        for words in ("link del slmbr0", *(f"netns del slm-{node}" for node in NODES)):
            subprocess.run(["ip", *words.split()], capture_output=True)

    def ask(self, *words: str) -> str:
        """A command of SLURM -> what it prints."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}{self.logs()}"
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says of a job: JobState, Restarts, NodeList ..."""
        shown = self.ask("scontrol", "show", "job", "-o", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, until, seconds: float = 300) -> None:
        last = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < last, f"waited {seconds} s in vain{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        tails = [f"\n{file.name}: {file.read_text()[-1500:]}" for file in sorted((self.at / "log").iterdir())]
        return "".join(tails)

    def processes(self, node: str) -> list[tuple[int, str]]:
        """(process id, command line) of what runs on a node."""
        here = os.stat(f"/run/netns/slm-{node}").st_ino
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.stat(folder / "ns" / "net").st_ino == here:
                    found.append((int(folder.name), (folder / "cmdline").read_text().replace("\0", " ").strip()))
            except OSError:
                continue  # it has ended
        return found

    def crash(self, node: str, keep: int) -> None:
        """SIGKILL for slurmd, slurmstepd and everything else on a node but one process, the orphan."""
        found = self.processes(node)
        assert keep in (pid for pid, _ in found)
        for pid, _ in sorted(found, key=lambda each: not each[1].startswith(("slurmd", "slurmstepd"))):
            if pid != keep:
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait()

    def stop(self) -> None:
        """Whatever has happened: the nodes' processes are found by their network namespace."""
        for name in ("slurmctld", *NODES, "munged"):
            if daemon := self.daemons.pop(name, None):
                daemon.kill()
                daemon.wait()
        for node in NODES:
            if Path(f"/run/netns/slm-{node}").exists():
                for pid, _ in self.processes(node):
                    os.kill(pid, signal.SIGKILL)
        self._remove_network()
