//! How two servers carry out the same read: their plans without a value of it, and which index the slower one does without.

use serde_json::Value;

/// One node of a plan.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    depth: usize,
    kind: String,
    relation: Option<String>,
    index: Option<String>,
}

impl Node {
    /// The table that it reads by no index.
    fn scans(&self) -> Option<&str> {
        self.relation.as_deref().filter(|_| self.kind == "Seq Scan")
    }
}

/// The nodes of what EXPLAIN (FORMAT JSON) gives, from the root down. None: it is no plan.
pub fn nodes(explained: &str) -> Option<Vec<Node>> {
    let document: Value = serde_json::from_str(explained).ok()?;
    let mut nodes = Vec::new();
    add(document.get(0)?.get("Plan")?, 0, &mut nodes);
    Some(nodes)
}

/// Conditions, which hold values, are left out. (serde_json bounds the depth.)
fn add(plan: &Value, depth: usize, nodes: &mut Vec<Node>) {
    let text = |key: &str| plan[key].as_str().map(str::to_owned);
    let kind = text("Node Type").unwrap_or_default();
    nodes.push(Node { depth, kind, relation: text("Relation Name"), index: text("Index Name") });
    for child in plan["Plans"].as_array().into_iter().flatten() {
        add(child, depth + 1, nodes);
    }
}

/// A line for each node, for people.
pub fn lines(nodes: &[Node]) -> Vec<String> {
    let line = |node: &Node| {
        let mut line = format!("{}{}", "  ".repeat(node.depth), node.kind);
        if let Some(index) = &node.index {
            line += &format!(" using {index}");
        }
        if let Some(relation) = &node.relation {
            line += &format!(" on {relation}");
        }
        line
    };
    nodes.iter().map(line).collect()
}

/// The indexes that old uses on tables that new reads from end to end.
pub fn missing(old: &[Node], new: &[Node]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for table in new.iter().filter_map(Node::scans) {
        if old.iter().any(|node| node.scans() == Some(table)) {
            continue;
        }
        for index in indexes_of(old, table) {
            let said = format!("old reads {table} by the index {index}, and new from end to end: is it missing there?");
            if !found.contains(&said) {
                found.push(said);
            }
        }
    }
    found
}

/// A Bitmap Index Scan does not name its table: the Bitmap Heap Scan above it does.
fn indexes_of<'n>(nodes: &'n [Node], table: &'n str) -> impl Iterator<Item = &'n str> {
    let below = move |at: usize| {
        let depth = nodes[at].depth;
        let inside = nodes[at + 1..].iter().take_while(move |node| node.depth > depth);
        inside.filter(|node| node.relation.is_none()).filter_map(|node| node.index.as_deref())
    };
    (0..nodes.len())
        .filter(move |at| nodes[*at].relation.as_deref() == Some(table))
        .flat_map(move |at| nodes[at].index.as_deref().into_iter().chain(below(at)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BITMAP: &str = r#"[{"Plan": {"Node Type": "Aggregate", "Plans": [{"Node Type": "Bitmap Heap Scan", "Relation Name": "notes",
        "Recheck Cond": "(owner = 4711)", "Plans": [{"Node Type": "Bitmap Index Scan", "Index Name": "notes_owner", "Index Cond": "(owner = 4711)"}]}]}}]"#;
    const SCAN: &str = r#"[{"Plan": {"Node Type": "Aggregate", "Plans": [{"Node Type": "Seq Scan", "Relation Name": "notes", "Filter": "(owner = 4711)"}]}}]"#;

    #[test]
    fn the_index_that_new_does_without_is_named_and_no_value_is() {
        let (old, new) = (nodes(BITMAP).unwrap(), nodes(SCAN).unwrap());
        assert_eq!(
            lines(&old),
            ["Aggregate", "  Bitmap Heap Scan on notes", "    Bitmap Index Scan using notes_owner"]
        );
        assert_eq!(lines(&new), ["Aggregate", "  Seq Scan on notes"]);
        assert_eq!(
            missing(&old, &new),
            ["old reads notes by the index notes_owner, and new from end to end: is it missing there?"]
        );
        assert_eq!(missing(&new, &old), Vec::<String>::new());
        assert_eq!(missing(&new, &new), Vec::<String>::new());
        assert_eq!(nodes("[]"), None);
        assert_eq!(nodes("no plan"), None);
    }
}
