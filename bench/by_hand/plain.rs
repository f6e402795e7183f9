//! Transactions against one address, statement by statement.

use crate::connection::Connection;
use crate::statements::{Draw, Workload};
use crate::{Arguments, Outcome};

/// One client.
pub struct Plain {
    connection: Connection,
    workload: Workload,
}

impl Plain {
    pub async fn connect(arguments: &Arguments) -> Outcome<Plain> {
        let mut connection = Connection::open(&arguments.old, &arguments.database, "").await?;
        let workload = arguments.workload;
        let mut statements: Vec<_> = workload.statements().iter().map(|statement| statement.prepared()).collect();
        statements.extend([("begin", "BEGIN", &[][..]), ("commit", "COMMIT", &[])]);
        connection.prepare(&statements).await?;
        Ok(Plain { connection, workload })
    }

    pub async fn transaction(&mut self, draw: &Draw) -> Outcome<()> {
        let block = !self.workload.is_autocommit();
        if block {
            self.connection.put("begin", &[]);
            self.connection.run().await?;
        }
        for statement in self.workload.statements() {
            statement.put(draw, &mut self.connection);
            self.connection.run().await?;
        }
        if block {
            self.connection.put("commit", &[]);
            self.connection.run().await?;
        }
        Ok(())
    }
}
