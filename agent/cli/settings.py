"""Which host a command is about: the agent's configuration, and options that win over it."""

from __future__ import annotations

import argparse
import functools
import logging
from typing import Any

from agent.errors import ConfigError
from hypervisor.toolstack import drivers
from hypervisor.toolstack.api import Toolstack

LOG = logging.getLogger(__name__)


class Connection:
    """Resolved when first used, so that help works with a broken configuration.

    :param driver: name of a driver, or None for the configured one.
    :param settings: driver settings that win over the configured ones.
    :param config_files: read instead of the usual places.
    """

    def __init__(
        self, driver: str | None = None, settings: dict[str, str] | None = None, config_files: list[str] | None = None
    ) -> None:
        self._driver = driver
        self._settings = dict(settings or {})
        self._config_files = config_files

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """The options every command takes."""
        group = parser.add_argument_group("which host")
        group.add_argument(
            "--config-file",
            action="append",
            metavar="FILE",
            help="the agent's configuration; default: the usual places",
        )
        group.add_argument("--driver", metavar="NAME", help=f"one of: {', '.join(drivers.names())}")
        group.add_argument("--socket", metavar="PATH", help="control socket of reeve-hypervisor (driver embedded)")
        group.add_argument(
            "--driver-setting",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="a setting of the driver, for example state_dir=/tmp/x; repeatable",
        )

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> Connection:
        settings = {}
        for text in options.driver_setting:
            key, equals, value = text.partition("=")
            if not equals or not key:
                raise ConfigError(f"--driver-setting {text!r} is no KEY=VALUE")
            settings[key] = value
        if options.socket:
            settings["socket"] = options.socket
        return cls(options.driver, settings, options.config_file)

    @functools.cached_property
    def _conf(self) -> Any:
        from agent import conf  # here: commands that only show help need no configuration

        return conf.load(self._config_files)

    @property
    def agent_settings(self) -> Any:
        """An `agent.conf.Settings`: the agent's configuration as a whole."""
        return self._conf

    @property
    def overridden(self) -> bool:
        """Whether an option says another driver or another host than the configuration."""
        return self._driver is not None or bool(self._settings)

    @property
    def driver(self) -> str:
        return self._driver or str(self._conf.driver)

    @property
    def settings(self) -> dict[str, str]:
        """Of the driver. The configured ones count when the configured driver is the one in use."""
        if self._driver is not None and self._settings:
            return dict(self._settings)
        configured = dict(self._conf.driver_settings) if self._conf.driver == self.driver else {}
        return {**configured, **self._settings}

    @property
    def broker_url(self) -> str:
        return str(self._conf.broker_url)

    @property
    def broker_quorum(self) -> bool:
        """Whether the broker's queues are quorum queues."""
        return bool(self._conf.broker_quorum)

    @functools.cached_property
    def broker_tls(self) -> Any:
        """An `agent.rpc.tls.BrokerTls`."""
        tls = self._conf.broker_tls
        if tls.insecure:
            LOG.warning("%s", tls.warning)
        return tls

    @functools.cached_property
    def signer(self) -> Any:
        """An `agent.signing.Signer`, or None."""
        return self._conf.signing.signer()

    @property
    def host(self) -> str:
        return str(self._conf.host)

    @property
    def state_dir(self) -> str:
        return str(self._conf.state_dir)

    @property
    def image_dir(self) -> str:
        return str(self._conf.image_dir)

    @property
    def images(self) -> Any:
        """An `agent.conf_images.ImageSettings`."""
        return self._conf.images

    @property
    def config_drive_dir(self) -> str:
        return str(self._conf.config_drive_dir)

    def loader(self, name: str) -> str:
        """Path of a loader that boots from a disk: ``pv-grub`` or ``pv-grub-i386``."""
        return str(self._conf.grub_i386 if name == "pv-grub-i386" else self._conf.grub_x86_64)

    def toolstack(self) -> Toolstack:
        """A new connection to the driver; the caller closes it."""
        return drivers.load(self.driver, self.settings)
