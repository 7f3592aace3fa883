"""The fake driver's templates: what `FakeDomain` says of a suspended guest, kept under a name."""

from __future__ import annotations

import dataclasses
import time

from hypervisor.errors import (
    OperationTimeout,
    SpecInvalid,
    TemplateExists,
    TemplateInUse,
    TemplateNotFound,
    WrongState,
)
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, TemplateInfo
from hypervisor.toolstack.drivers import _fake_guest as guest
from hypervisor.toolstack.drivers._fake_saving import SavingVerbs
from hypervisor.toolstack.drivers._fake_store import FakeDomain
from hypervisor.toolstack.template import check_begins, check_template_ident, check_template_name


class TemplateVerbs(SavingVerbs):
    """Part of `hypervisor.toolstack.drivers.fake.FakeToolstack`."""

    def template_create(
        self, uuid: str, name: str, *, ident: str, keep_running: bool = False, timeout: float = 60.0
    ) -> TemplateInfo:
        with self._verb("template_create"):
            domain = self._live(uuid, "make a template of")
            check_template_name(name)
            check_template_ident(ident)
            if self.store.template(name) is not None:
                raise TemplateExists(f"there is a template {name!r} already: remove it, or give another name")
            if domain.state is not DomainState.RUNNING:
                raise WrongState(f"domain {uuid} is {domain.state.value}, its guest cannot suspend: unpause it first")
            if keep_running and any(not disk.readonly for disk in domain.spec.disks):
                raise WrongState(f"domain {uuid} would go on writing to its disks: detach them, or let it go")
            if guest.option(domain, "shutdown") == "ignore":
                raise OperationTimeout(f"the guest of domain {uuid} did not suspend within {timeout:g} s: it runs on")
            spec = dataclasses.replace(
                domain.spec,
                owner="",
                vcpus=domain.wanted_vcpus,
                max_vcpus=domain.max_vcpus,
                memory_mib=domain.target_mib,
                max_memory_mib=domain.max_memory_mib,
            )
            pages = domain.memory_mib * 256
            stood = 1.0 if keep_running else 0.0
            info = TemplateInfo(name, ident, spec, 64, pages, pages * 4096, time.time(), stood)
            self.store.put_template(name, info.to_json())
            if not keep_running:
                self.store.delete(uuid)
                self.store.emit("destroyed", uuid, "saved")
            return info

    def template_list(self) -> list[TemplateInfo]:
        with self._verb("template_list"):
            return [self._template(doc["name"]) for doc in self.store.templates()]

    def template_get(self, name: str) -> TemplateInfo:
        with self._verb("template_get"):
            return self._template(name)

    def template_remove(self, name: str, *, force: bool = False) -> None:
        with self._verb("template_remove"):
            if (users := self._template(name).users) and not force:
                raise TemplateInUse(f"template {name} is the memory of domain {users[0]}: destroy it first")
            self.store.forget_template(name)

    def clone(self, template: str, spec: DomainSpec) -> DomainInfo:
        with self._verb("clone"):
            spec.validate()
            info = self._template(template)
            check_begins(spec, info)
            self.check_room(spec)
            devices = self.new_devices(spec)
            domain = FakeDomain(spec=spec, domid=self.store.next_domid(), created_at=time.time(), devices=devices)
            domain.template = info.ident
            self.store.put(domain)
            self.store.emit("created", spec.uuid, "restored")
            return domain.info()

    def _template(self, name: str) -> TemplateInfo:
        check_template_name(name)
        doc = self.store.template(name)
        if doc is None:
            raise TemplateNotFound(f"there is no template {name!r}: look at `reeve template list`")
        try:
            info = TemplateInfo.from_json(doc)
        except SpecInvalid as exc:
            raise TemplateNotFound(f"template {name} cannot be read: {exc.message}") from exc
        users = sorted(domain.uuid for domain in self.store.domains() if domain.template == info.ident)
        return dataclasses.replace(info, users=tuple(users))
