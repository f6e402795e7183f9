//! Sequences of the side that becomes authority, set beyond the other side's: what it gives out next must not collide with what the
//! application already has.

use std::collections::HashMap;

use tokio_postgres::Client;

use super::error::Error;
use crate::catalog::{Catalog, quote};
use crate::phase::Side;

/// A sequence that was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// `schema.name` on the side that was set.
    pub name: String,
    /// What it would have given out next before.
    pub before: i64,
    /// What it gives out next now; None: it is exhausted, as the other side's is.
    pub next: Option<i64>,
}

/// Definition and position of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    increment: i64,
    least: i64,
    most: i64,
    cycle: bool,
    last: i64,
    called: bool,
}

/// What a sequence is to be set to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// It stands right already.
    Stay,
    /// It gives out this next.
    Next(i64),
    /// It has nothing left.
    Exhausted(i64),
    /// Its bounds, of which this is the last, do not hold what the other side has given out.
    TooNarrow(i64),
}

impl Position {
    fn next(&self) -> i128 {
        i128::from(self.last) + if self.called { i128::from(self.increment) } else { 0 }
    }

    fn holds(&self, value: i128) -> bool {
        (i128::from(self.least)..=i128::from(self.most)).contains(&value)
    }

    /// The end towards which it runs.
    fn end(&self) -> i64 {
        if self.increment > 0 { self.most } else { self.least }
    }
}

/// Where `gaining` must stand so that it gives out nothing that `losing` has given out, or will in the next `margin` calls.
fn target(losing: &Position, gaining: &Position, margin: u32) -> Target {
    let up = losing.increment > 0;
    let mut next = losing.next() + i128::from(losing.increment) * i128::from(margin);
    if losing.cycle && gaining.cycle {
        // There is no "beyond" in a circle: go on where the other side is.
        let span = i128::from(losing.most) - i128::from(losing.least) + 1;
        next = i128::from(losing.least) + (next - i128::from(losing.least)).rem_euclid(span);
        return if gaining.holds(next) { Target::Next(next as i64) } else { Target::TooNarrow(gaining.end()) };
    }
    let ahead = |a: i128, b: i128| if up { a >= b } else { a <= b };
    if (gaining.increment > 0) == up && ahead(gaining.next(), next) {
        return Target::Stay;
    }
    if !losing.holds(losing.next()) {
        // The other side has given out its last value. So has this one, if it has no more room.
        let beyond = losing.next();
        return if gaining.holds(beyond) { Target::Next(beyond as i64) } else { Target::Exhausted(gaining.end()) };
    }
    if !gaining.holds(next) {
        // Without the margin, rather than exhausted.
        next = losing.next();
    }
    if gaining.holds(next) { Target::Next(next as i64) } else { Target::TooNarrow(gaining.end()) }
}

/// Where a sequence of the side that gains authority stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ahead {
    /// `schema.name` on that side.
    pub name: String,
    /// The move sets it; false: it is beyond the other side's already.
    pub set: bool,
    /// Values that it has left once it is set; None: it begins again at its end (CYCLE), or its bounds do not hold what it is to be set to.
    pub left: Option<u64>,
    /// It can be set.
    pub fits: bool,
}

/// Looks at what [`sequences`] would do, and changes nothing. Values may be drawn on `losing` meanwhile.
pub async fn look(losing: (Side, &Client), gaining: (Side, &Client), catalog: &Catalog) -> Result<Vec<Ahead>, Error> {
    let mut ahead = Vec::new();
    for (name, their, our) in pairs(losing, gaining, catalog).await? {
        let found = target(&their, &our, 0);
        let next = match found {
            Target::Stay => our.next(),
            Target::Next(next) => i128::from(next),
            Target::Exhausted(last) | Target::TooNarrow(last) => i128::from(last) + i128::from(our.increment),
        };
        let room = (i128::from(our.end()) - next) / i128::from(our.increment) + 1;
        let fits = !matches!(found, Target::TooNarrow(_));
        let left = (fits && !our.cycle).then(|| u64::try_from(room.max(0)).unwrap_or(u64::MAX));
        ahead.push(Ahead { name: format!("{}.{}", name.0, name.1), set: found != Target::Stay, left, fits });
    }
    ahead.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(ahead)
}

/// Sequences that stand for each other: the name of `gaining`'s, and both positions.
async fn pairs(
    losing: (Side, &Client),
    gaining: (Side, &Client),
    catalog: &Catalog,
) -> Result<Vec<(Name, Position, Position)>, Error> {
    let (theirs, ours, renamed) =
        tokio::try_join!(positions(losing), positions(gaining), owned(losing, gaining, catalog))?;
    let pair = |(name, their): (Name, Position)| {
        let ours_name = renamed.get(&name).unwrap_or(&name).clone();
        let our = *ours.get(&ours_name)?;
        Some((ours_name, their, our))
    };
    Ok(theirs.into_iter().filter_map(pair).collect())
}

/// Sets every sequence of `gaining` (the side that becomes authority) beyond the one of `losing` that stands for it: those that
/// columns of migrating tables own, and all others of the same schema and name. `margin`: how many values to leave free (sessions of the
/// losing side may still hold cached ones). Durable when it returns. Nobody may call nextval on `losing` while this runs.
pub async fn sequences(
    losing: (Side, &Client),
    gaining: (Side, &Client),
    catalog: &Catalog,
    margin: u32,
) -> Result<Vec<Moved>, Error> {
    let mut moved = Vec::new();
    let mut sql = String::from("BEGIN; SET LOCAL synchronous_commit = on; UPDATE crossfade.flush SET n = n + 1;");
    for (ours_name, their, our) in pairs(losing, gaining, catalog).await? {
        let label = format!("{}.{}", ours_name.0, ours_name.1);
        let (value, called) = match target(&their, &our, margin) {
            Target::Stay => continue,
            Target::Next(next) => (next, false),
            Target::Exhausted(last) => (last, true),
            Target::TooNarrow(_) => {
                return Err(Error::Unfit(format!(
                    "sequence {label} on {} cannot give out {}, which {} would give out next: ALTER SEQUENCE {label} with wider bounds",
                    gaining.0,
                    their.next(),
                    losing.0
                )));
            }
        };
        let literal = format!("{}.{}", quote(&ours_name.0), quote(&ours_name.1)).replace('\'', "''");
        sql.push_str(&format!("SELECT pg_catalog.setval('{literal}', {value}, {called});"));
        moved.push(Moved { name: label, before: our.next() as i64, next: (!called).then_some(value) });
    }
    sql.push_str("COMMIT");
    if let Err(error) = gaining.1.batch_execute(&sql).await {
        let _ = gaining.1.batch_execute("ROLLBACK").await;
        return Err(Error::from_driver(gaining.0, "setting sequences", &error));
    }
    Ok(moved)
}

type Name = (String, String);

async fn positions((side, client): (Side, &Client)) -> Result<HashMap<Name, Position>, Error> {
    let failed = |error: tokio_postgres::Error| Error::from_driver(side, "reading sequences", &error);
    let text = "SELECT n.nspname, c.relname, s.seqincrement, s.seqmin, s.seqmax, s.seqcycle FROM pg_catalog.pg_sequence s \
        JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        WHERE c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'crossfade') ORDER BY 1, 2";
    let rows = client.query_typed(text, &[]).await.map_err(failed)?;
    let mut found = HashMap::new();
    for rows in rows.chunks(200) {
        let names: Vec<Name> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let selects: Vec<String> = names
            .iter()
            .enumerate()
            .map(|(n, (schema, name))| {
                format!("SELECT {n}, last_value, is_called FROM {}.{}", quote(schema), quote(name))
            })
            .collect();
        for (n, state) in client
            .query_typed(&selects.join(" UNION ALL "), &[])
            .await
            .map_err(failed)?
            .iter()
            .map(|row| (row.get::<_, i32>(0) as usize, row))
        {
            let row = &rows[n];
            let (increment, least, most, cycle) = (row.get(2), row.get(3), row.get(4), row.get(5));
            let position = Position { increment, least, most, cycle, last: state.get(1), called: state.get(2) };
            found.insert(names[n].clone(), position);
        }
    }
    Ok(found)
}

/// Sequences of migrating tables' columns: theirs to ours, where tables, columns or sequences are named differently.
async fn owned(
    losing: (Side, &Client),
    gaining: (Side, &Client),
    catalog: &Catalog,
) -> Result<HashMap<Name, Name>, Error> {
    let (theirs, mut ours) = tokio::try_join!(owners(losing, catalog), owners(gaining, catalog))?;
    Ok(theirs.into_iter().filter_map(|(column, sequence)| Some((sequence, ours.remove(&column)?))).collect())
}

/// (table's number, position of the column) to the sequence that it owns or draws its default from.
async fn owners((side, client): (Side, &Client), catalog: &Catalog) -> Result<HashMap<(u32, usize), Name>, Error> {
    let text = "SELECT d.refobjid, a.attname::text, n.nspname::text, c.relname::text FROM pg_catalog.pg_depend d \
        JOIN pg_catalog.pg_class c ON c.oid = d.objid AND c.relkind = 'S' JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
        JOIN pg_catalog.pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid \
        WHERE d.classid = 'pg_catalog.pg_class'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass AND d.deptype IN ('a', 'i')";
    let rows = client
        .query_typed(text, &[])
        .await
        .map_err(|error| Error::from_driver(side, "reading owners of sequences", &error))?;
    Ok(rows
        .iter()
        .filter_map(|row| {
            let table = catalog.by_oid.get(side).get(&row.get::<_, u32>(0))?;
            let column: String = row.get(1);
            let at = table.columns.iter().position(|known| *known.name.get(side) == column)?;
            Some(((table.number, at), (row.get(2), row.get(3))))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn up(last: i64, called: bool) -> Position {
        Position { increment: 1, least: 1, most: 100, cycle: false, last, called }
    }

    #[test]
    fn the_gaining_sequence_goes_beyond_the_losing_one_in_its_direction() {
        assert_eq!(target(&up(10, true), &up(1, false), 0), Target::Next(11));
        assert_eq!(target(&up(10, false), &up(1, false), 0), Target::Next(10));
        assert_eq!(target(&up(10, true), &up(1, false), 5), Target::Next(16));
        assert_eq!(target(&up(10, true), &up(40, true), 5), Target::Stay);
        assert_eq!(target(&up(98, true), &up(1, false), 50), Target::Next(99), "the margin gives way to the bounds");
        assert_eq!(target(&up(100, true), &up(1, false), 5), Target::Exhausted(100));
        let wide = Position { most: 1000, ..up(1, false) };
        assert_eq!(target(&up(100, true), &wide, 5), Target::Next(101));
        let narrow = Position { most: 5, ..up(1, false) };
        assert_eq!(target(&up(10, true), &narrow, 0), Target::TooNarrow(5));
    }

    #[test]
    fn descending_and_cycling_sequences() {
        let down = |last| Position { increment: -2, least: -100, most: -1, cycle: false, last, called: true };
        assert_eq!(target(&down(-11), &down(-1), 1), Target::Next(-15));
        assert_eq!(target(&down(-11), &down(-50), 1), Target::Stay);
        let ring = |last| Position { cycle: true, ..up(last, true) };
        assert_eq!(target(&ring(99), &ring(3), 5), Target::Next(5));
        assert_eq!(target(&ring(10), &ring(90), 0), Target::Next(11));
    }
}
