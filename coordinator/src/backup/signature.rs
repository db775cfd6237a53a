//! AWS Signature Version 4 for S3, in the `Authorization` header (pure).
//!
//! From Amazon's public documentation: the request in a canonical form is hashed, and the hash signed with a key
//! that HMAC-SHA256 derives from the secret, the day, the region and the service.

use ring::hmac;
use sha2::{Digest, Sha256};

/// What is signed.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// `GET`, `PUT`, `DELETE`.
    pub method: &'a str,
    /// Path with its slashes, not escaped.
    pub path: &'a str,
    /// Names and values, not escaped, in any order.
    pub query: &'a [(&'a str, &'a str)],
    /// All headers that are signed, names in lower case, in any order; `x-amz-date` and `x-amz-content-sha256`
    /// among them.
    pub headers: &'a [(&'a str, &'a str)],
    /// SHA-256 of the body, hexadecimal.
    pub body_sha256: &'a str,
}

/// Whose signature, for where.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    /// Name of the key.
    pub access_key: &'a str,
    /// The key.
    pub secret_key: &'a str,
    /// Of the bucket.
    pub region: &'a str,
    /// `20260102T030405Z`.
    pub time: &'a str,
}

impl std::fmt::Debug for Scope<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Scope({} in {} at {})",
            self.access_key, self.region, self.time
        )
    }
}

/// The value of the `Authorization` header.
#[must_use]
pub fn authorization(request: &Request<'_>, scope: &Scope<'_>) -> String {
    let mut headers: Vec<_> = request.headers.iter().map(|(n, v)| (*n, v.trim())).collect();
    headers.sort_unstable();
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    let names = names.join(";");
    let headers: String = headers
        .iter()
        .map(|(name, value)| format!("{name}:{value}\n"))
        .collect();
    let canonical = format!(
        "{}\n{}\n{}\n{headers}\n{names}\n{}",
        request.method,
        escaped(request.path, true),
        canonical_query(request.query),
        request.body_sha256
    );
    let day = scope.time.get(..8).unwrap_or_default();
    let place = format!("{day}/{}/s3/aws4_request", scope.region);
    let canonical = hex::encode(Sha256::digest(canonical));
    let to_sign = format!("AWS4-HMAC-SHA256\n{}\n{place}\n{canonical}", scope.time);
    let mut key = format!("AWS4{}", scope.secret_key).into_bytes();
    for part in [day, scope.region, "s3", "aws4_request"] {
        key = mac(&key, part);
    }
    let signature = hex::encode(mac(&key, &to_sign));
    let access_key = scope.access_key;
    format!("AWS4-HMAC-SHA256 Credential={access_key}/{place},SignedHeaders={names},Signature={signature}")
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, key);
    hmac::sign(&key, text.as_bytes()).as_ref().to_vec()
}

/// A query as it is signed, and as it must be sent.
#[must_use]
pub fn canonical_query(query: &[(&str, &str)]) -> String {
    let escape = |(name, value): &(&str, &str)| (escaped(name, false), escaped(value, false));
    let mut query: Vec<_> = query.iter().map(escape).collect();
    query.sort_unstable();
    let query: Vec<_> = query
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    query.join("&")
}

/// Escapes all but letters, digits and `-._~`; slashes too unless they are kept.
#[must_use]
pub fn escaped(text: &str, slashes: bool) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || (slashes && byte == b'/') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const WELCOME: &str = "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072";

    /// The four examples of Amazon's page on signatures in the `Authorization` header.
    #[test]
    fn the_documented_examples_are_signed_alike() {
        let scope = Scope {
            access_key: "AKIAIOSFODNN7EXAMPLE",
            secret_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            region: "us-east-1",
            time: "20130524T000000Z",
        };
        let date = "Fri, 24 May 2013 00:00:00 GMT";
        let class = "REDUCED_REDUNDANCY";
        let get =
            |path, query, more: &[(&'static str, &'static str)]| ("GET", path, query, EMPTY, more.to_vec());
        let no_query: &[(&str, &str)] = &[];
        let rows = [
            (
                get("/test.txt", no_query, &[("range", "bytes=0-9")]),
                "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41",
            ),
            (
                (
                    "PUT",
                    "/test$file.text",
                    no_query,
                    WELCOME,
                    vec![("date", date), ("x-amz-storage-class", class)],
                ),
                "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd",
            ),
            (
                get("/", &[("lifecycle", "")], &[]),
                "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543",
            ),
            (
                get("/", &[("prefix", "J"), ("max-keys", "2")], &[]),
                "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7",
            ),
        ];
        for ((method, path, query, body_sha256, more), signature) in rows {
            let mut headers = vec![
                ("host", "examplebucket.s3.amazonaws.com"),
                ("x-amz-content-sha256", body_sha256),
                ("x-amz-date", scope.time),
            ];
            headers.extend(more);
            let request = Request {
                method,
                path,
                query,
                headers: &headers,
                body_sha256,
            };
            let found = authorization(&request, &scope);
            assert!(found.ends_with(signature), "{method} {path}: {found}");
        }
    }
}
