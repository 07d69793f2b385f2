#!/usr/bin/env bash
# Made the signed archive beside this file, which the tests of criu_setup install from without a network. It has two
# packages: `criu`, and `libc6` whose "loader" is a script that answers as `criu --version` does. The key is thrown away.
# Needs gnupg and dpkg. Run it only to change what is in the archive.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf dists pool keyring.gpg
mkdir -p pool

package() { # NAME VERSION DEPENDS
    mkdir -p "$work/$1/DEBIAN" "$work/$1/usr/share/doc/$1"
    printf 'Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: Tests <tests@example.org>\nDescription: for tests\n%s' \
        "$1" "$2" "${3:+Depends: $3$'\n'}" >"$work/$1/DEBIAN/control"
    echo "Copyright" >"$work/$1/usr/share/doc/$1/copyright"
    find "$work/$1" -exec touch -d 2025-01-01 {} +
    dpkg-deb --root-owner-group -Zgzip --build "$work/$1" "pool/$1_$2_all.deb" >/dev/null
}

mkdir -p "$work/criu/usr/sbin" "$work/criu/usr/share/man"
echo "a binary" >"$work/criu/usr/sbin/criu"
echo "not needed" >"$work/criu/usr/share/man/criu.8"
for loader in x86_64-linux-gnu/ld-linux-x86-64.so.2 aarch64-linux-gnu/ld-linux-aarch64.so.1; do
    file="$work/libc6/usr/lib/$loader"
    mkdir -p "$(dirname "$file")"
    printf '#!/bin/sh\ntest "$1" = --library-path && test -f "$3" && echo "Version: 4.1.1"\n' >"$file"
    chmod 755 "$file"
done
package criu 4.1.1-1 libc6
package libc6 2.41-1 ""

for arch in amd64 arm64; do
    mkdir -p "dists/trixie/main/binary-$arch"
    dpkg-scanpackages pool >"dists/trixie/main/binary-$arch/Packages"
done
{
    printf 'Origin: Tests\nLabel: Tests\nSuite: trixie\nCodename: trixie\nDate: Wed, 01 Jan 2025 00:00:00 UTC\n'
    printf 'Architectures: amd64 arm64\nComponents: main\nSHA256:\n'
    (cd dists/trixie && for file in main/*/Packages; do
        printf ' %s %s %s\n' "$(sha256sum "$file" | cut -d' ' -f1)" "$(stat -c %s "$file")" "$file"
    done)
} >"$work/Release"
export GNUPGHOME="$work/gnupg"
mkdir -m 700 "$GNUPGHOME"
gpg --faked-system-time 20250101T000000! --batch --quiet --passphrase '' --quick-generate-key "Tests <tests@example.org>" ed25519 sign never
gpg --faked-system-time 20250101T000000! --batch --quiet --export >keyring.gpg
gpg --faked-system-time 20250101T000000! --batch --quiet --digest-algo SHA512 --clearsign <"$work/Release" >dists/trixie/InRelease
gpgconf --kill all
