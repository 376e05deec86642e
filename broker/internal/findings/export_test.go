package findings

const RiskQuery = riskQuery
