//! `${NAME}` in a value: the environment's text, put in after YAML was read, so that no character of it is YAML.

use serde_yaml::Value;

use super::locate::Step;

/// Replaces every `${NAME}` in the strings of `value`; `$${` stands for `${`. Keys are left alone.
/// An error is the path of the string and what is wrong with it.
pub(super) fn substitute(value: &mut Value, env: &dyn Fn(&str) -> Option<String>) -> Result<(), (Vec<Step>, String)> {
    let mut path = Vec::new();
    walk(value, env, &mut path).map_err(|message| (path, message))
}

/// On an error `path` is left as the path of the string that has it.
fn walk(value: &mut Value, env: &dyn Fn(&str) -> Option<String>, path: &mut Vec<Step>) -> Result<(), String> {
    match value {
        Value::String(text) => {
            if text.contains("${") {
                *text = expand(text, env)?;
            }
        }
        Value::Sequence(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                path.push(Step::Item(index));
                walk(item, env, path)?;
                path.pop();
            }
        }
        Value::Mapping(entries) => {
            for (key, item) in entries.iter_mut() {
                path.push(Step::Key(key.as_str().unwrap_or_default().to_owned()));
                walk(item, env, path)?;
                path.pop();
            }
        }
        Value::Tagged(tagged) => walk(&mut tagged.value, env, path)?,
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    Ok(())
}

fn expand(text: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            out.push_str(&rest[..at - 1]);
            out.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        out.push_str(&rest[..at]);
        let after = &rest[at + 2..];
        let end = after.find('}').ok_or("a ${ without its }: expected ${NAME} ($${ stands for ${)")?;
        let name = &after[..end];
        let valid = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if !valid {
            return Err("expected ${NAME} with letters, digits and _ in the name ($${ stands for ${)".to_owned());
        }
        out.push_str(&env(name).ok_or_else(|| {
            format!("the environment variable {name} is not set: expected it to hold this value or a part of it")
        })?);
        rest = &after[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replaces_names_and_says_what_is_wrong() {
        let env = |name: &str| (name == "PW").then(|| "a: \"b\" # ${PW}".to_owned());
        assert_eq!(expand("x${PW}y", &env).unwrap(), "xa: \"b\" # ${PW}y");
        assert_eq!(expand("$${PW} $5", &env).unwrap(), "${PW} $5");
        assert!(expand("${NOPE}", &env).unwrap_err().contains("NOPE is not set"));
        assert!(expand("${PW", &env).unwrap_err().contains("without its }"));
        assert!(expand("${}", &env).is_err());
    }
}
