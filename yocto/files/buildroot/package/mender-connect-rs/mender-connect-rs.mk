################################################################################
#
# mender-connect-rs
#
################################################################################

MENDER_CONNECT_RS_CHECKOUT := $(abspath $(BR2_EXTERNAL_MENDER_CONNECT_RS_PATH)/../../..)

# The git method, not the local one: only what is downloaded gets its crates.
MENDER_CONNECT_RS_SITE_METHOD = git
ifeq ($(call qstrip,$(BR2_PACKAGE_MENDER_CONNECT_RS_REPOSITORY)),)
MENDER_CONNECT_RS_SITE = file://$(MENDER_CONNECT_RS_CHECKOUT)
MENDER_CONNECT_RS_VERSION := $(shell git --git-dir=$(MENDER_CONNECT_RS_CHECKOUT)/.git rev-parse HEAD 2>/dev/null)
else
MENDER_CONNECT_RS_SITE = $(call qstrip,$(BR2_PACKAGE_MENDER_CONNECT_RS_REPOSITORY))
MENDER_CONNECT_RS_VERSION = $(call qstrip,$(BR2_PACKAGE_MENDER_CONNECT_RS_REVISION))
endif
ifeq ($(BR2_PACKAGE_MENDER_CONNECT_RS)$(MENDER_CONNECT_RS_VERSION),y)
$(error mender-connect-rs: no revision is set, and $(MENDER_CONNECT_RS_CHECKOUT) is no git checkout)
endif

MENDER_CONNECT_RS_CARGO_INC = \
	$(MENDER_CONNECT_RS_CHECKOUT)/yocto/recipes-mender/mender-connect-rs/mender-connect-rs-cargo.inc

# Before Rust and the crates are downloaded: cargo would find out only then.
ifeq ($(BR2_PACKAGE_MENDER_CONNECT_RS),y)
MENDER_CONNECT_RS_RUST_NEEDED := $(shell sed -n 's/^MCRS_RUST = "\(.*\)"/\1/p' $(MENDER_CONNECT_RS_CARGO_INC))
MENDER_CONNECT_RS_RUST := $(firstword $(RUST_BIN_VERSION) $(RUST_VERSION) $(MENDER_CONNECT_RS_RUST_NEEDED))
MENDER_CONNECT_RS_RUST_OLDER := $(firstword $(shell printf '%s\n' \
	$(MENDER_CONNECT_RS_RUST) $(MENDER_CONNECT_RS_RUST_NEEDED) | sort -V))
ifneq ($(MENDER_CONNECT_RS_RUST_OLDER),$(MENDER_CONNECT_RS_RUST_NEEDED))
$(error mender-connect-rs needs Rust $(MENDER_CONNECT_RS_RUST_NEEDED) or newer, \
	but this Buildroot has $(MENDER_CONNECT_RS_RUST): use 2025.08 or newer)
endif
endif

MENDER_CONNECT_RS_LICENSE := $(shell sed -n 's/ & /, /g; s/^MCRS_LICENSES = "\(.*\)"/\1/p' \
	$(MENDER_CONNECT_RS_CARGO_INC))
MENDER_CONNECT_RS_LICENSE_FILES = LICENSE

MENDER_CONNECT_RS_DEPENDENCIES = dbus host-pkgconf

# What isn't named here, the vendored libdbus above all, isn't built.
MENDER_CONNECT_RS_FEATURES = dbus$(if $(BR2_PACKAGE_MENDER_CONNECT_RS_TLS),$(comma)tls)
MENDER_CONNECT_RS_CARGO_BUILD_OPTS = \
	--bin mender-connect --no-default-features --features $(MENDER_CONNECT_RS_FEATURES)

# Rust links statically with musl unless it is told, and libdbus is a shared library. The
# second flag is that of .cargo/config.toml, which Buildroot overwrites, the third what the
# infrastructure's variable of this name has for ARM.
MENDER_CONNECT_RS_MUSL_ENV = \
	CARGO_TARGET_$(call UPPERCASE,$(RUSTC_TARGET_NAME))_RUSTFLAGS="-Ctarget-feature=-crt-static \
	$(if $(BR2_ARCH_IS_64),,--cfg=libc_unstable_time64) \
	$(if $(filter arm,$(NORMALIZED_ARCH)),-Clink-arg=-Wl$(comma)--allow-multiple-definition)"

# The release profile of Cargo.toml: that of the infrastructure makes the executable twice as big.
MENDER_CONNECT_RS_CARGO_ENV = \
	CARGO_PROFILE_RELEASE_OPT_LEVEL="z" \
	CARGO_PROFILE_RELEASE_LTO="fat" \
	CARGO_PROFILE_RELEASE_CODEGEN_UNITS="1" \
	$(if $(BR2_TOOLCHAIN_USES_MUSL),$(MENDER_CONNECT_RS_MUSL_ENV))

# `cargo install` has options of its own, and leaves its notes on the target.
define MENDER_CONNECT_RS_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 \
		$(@D)/target/$(RUSTC_TARGET_NAME)/$(if $(BR2_ENABLE_DEBUG),debug,release)/mender-connect \
		$(TARGET_DIR)/usr/bin/mender-connect
	$(INSTALL) -d -m 0755 $(TARGET_DIR)/etc/mender
	printf '{\n    "ShellCommand": "%s",\n    "User": "%s"\n}\n' \
		'$(call qstrip,$(BR2_PACKAGE_MENDER_CONNECT_RS_SHELL))' \
		'$(call qstrip,$(BR2_PACKAGE_MENDER_CONNECT_RS_USER))' \
		> $(TARGET_DIR)/etc/mender/mender-connect.conf
endef

define MENDER_CONNECT_RS_PERMISSIONS
	/etc/mender/mender-connect.conf f 600 0 0 - - - - -
endef

define MENDER_CONNECT_RS_INSTALL_INIT_SYSTEMD
	$(INSTALL) -D -m 0644 $(@D)/yocto/files/mender-connect.service \
		$(TARGET_DIR)/usr/lib/systemd/system/mender-connect.service
endef

# OpenRC runs this one, too. After S42mender.
define MENDER_CONNECT_RS_INSTALL_INIT_SYSV
	$(INSTALL) -D -m 0755 $(@D)/yocto/files/mender-connect.init \
		$(TARGET_DIR)/etc/init.d/S43mender-connect
endef

$(eval $(cargo-package))
